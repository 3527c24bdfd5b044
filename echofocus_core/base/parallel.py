"""Process several items at a time, with results in order."""

from collections import deque


def map_ahead(pool, function, items, n):
    """Yield `function(item)` for each item in order, with up to `n` calls submitted to a pool.

    pool: a concurrent.futures executor. An exception in `function` is raised when its item is due.
    Calls that have not started are cancelled when the consumer stops.
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
