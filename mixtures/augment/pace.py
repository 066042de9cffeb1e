"""How fast requests go out: so many a minute, so many tokens a minute, and a pause where the server asks for one.

Requests leave one by one, evenly spaced: after a request of n estimated tokens the next may go after
max(60 / requests_per_min, 60 n / tokens_per_min) seconds. So no window of t seconds holds more than 1 + t/60 x the limit, and
nothing bursts when a stalled process wakes up.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable


class Pace:
    """The gate that every request passes. Clock and sleep are arguments so that a test can count instead of waiting."""

    def __init__(
        self,
        requests_per_min: float | None,
        tokens_per_min: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._request_s = 60.0 / requests_per_min if requests_per_min else 0.0
        self._token_s = 60.0 / tokens_per_min if tokens_per_min else 0.0
        self._clock, self._sleep = clock, sleep
        self._next_s = clock()
        self._gate = asyncio.Lock()

    async def turn(self, tokens: int) -> None:
        """Return when a request of `tokens` may be sent."""
        async with self._gate:
            while (wait_s := self._next_s - self._clock()) > 0:  # a pause may be set while this sleeps
                await self._sleep(wait_s)
            self._next_s = self._clock() + max(self._request_s, tokens * self._token_s)

    def pause(self, seconds: float) -> None:
        """Let nothing out for so long from now."""
        self._next_s = max(self._next_s, self._clock() + seconds)
