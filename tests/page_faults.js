// A list of what is wrong with the visible page: elements that are cut or outside the window, and
// texts with a contrast below 4.5 (WCAG 2.2) or below 12 px on a screen.
() => {
  const faults = [], root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) faults.push(`the page is ${root.scrollWidth} px wide`);
  const numbers = (colour) => colour.match(/[\d.]+/g).map(Number);
  const luminance = (colour) => {
    const [r, g, b] = numbers(colour).slice(0, 3).map((x) => {
      const share = x / 255;
      return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if ((numbers(colour)[3] ?? 1) > 0.99) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const screen = matchMedia("screen").matches;
  for (const element of document.body.querySelectorAll("*")) {
    const style = getComputedStyle(element), box = element.getBoundingClientRect();
    if (!element.checkVisibility() || element.matches(".skip, option")) continue;
    const name = `${element.tagName}.${element.className} ${element.textContent.slice(0, 30)}`;
    const cut = element.clientWidth && element.scrollWidth > element.clientWidth + 1;
    if (cut && style.overflowX !== "visible") faults.push(`cut: ${name}`);
    if (cut && element.matches("th, td, .row > *")) faults.push(`wider than its cell: ${name}`);
    if (box.right > innerWidth + 1 || box.left < -1) faults.push(`outside: ${name}`);
    const hasText = [...element.childNodes].some((x) => x.nodeType === 3 && x.data.trim());
    if (!hasText) continue;
    const light = [style.color, background(element)].map(luminance).sort((a, b) => b - a);
    const contrast = (light[0] + 0.05) / (light[1] + 0.05);
    if (contrast < 4.5) faults.push(`contrast ${contrast.toFixed(1)}: ${name}`);
    if (screen && parseFloat(style.fontSize) < 12) faults.push(`${style.fontSize}: ${name}`);
  }
  return faults;
}
