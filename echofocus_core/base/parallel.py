"""Work on several items at a time, with results in order."""

from collections import deque


def map_ahead(pool, function, items, n):
    """Yield `function(item)` of each item in order, up to `n` of them in work in a pool.

    pool: a concurrent.futures executor. An exception of `function` is raised at its item's turn.
    Work that has not started is cancelled when the consumer stops.
    """
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= n:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
