"""What answers cost: tokens times prices, counted from the usage that the endpoint reports, and never above a cap.

Before a request goes out its highest cost is set aside: estimated tokens of the prompt, and `max_tokens` of the answer. It is
sent only if what was ever paid (the whole log) and what is set aside stay below the cap. An endpoint whose tokens are smaller
than three bytes may pass the cap by what it counts more; what it counted is in the report.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mixtures.augment.prompts import Request, estimated_tokens

MILLION = 1_000_000


@dataclass(frozen=True)
class Prices:
    """Per million tokens, in any one currency."""

    prompt: float
    completion: float

    def cost(self, usage: dict[str, int]) -> float:
        """Of one answer."""
        return (usage["prompt_tokens"] * self.prompt + usage["completion_tokens"] * self.completion) / MILLION

    def total(self, entries: Iterable[dict[str, Any]]) -> float:
        """Of all answers among log entries."""
        return sum(sorted(self.cost(e["usage"]) for e in entries if "usage" in e))

    def most(self, request: Request) -> float:
        """What a request can cost."""
        return self.cost({"prompt_tokens": request.prompt_tokens, "completion_tokens": request.max_tokens})


class Budget:
    """The cap while requests are in flight."""

    def __init__(self, prices: Prices, cap: float | None, spent: float) -> None:
        self.prices, self.cap, self.spent = prices, cap, spent
        self._aside = 0.0
        self._changed = asyncio.Condition()

    async def admit(self, request: Request) -> bool:
        """Set the request's highest cost aside. False: it does not fit even when all others have come back cheap."""
        most = self.prices.most(request)
        async with self._changed:
            while self.cap is not None and self.spent + self._aside + most > self.cap:
                if self._aside <= 0.0:
                    return False
                await self._changed.wait()
            self._aside += most
        return True

    async def settle(self, request: Request, paid: float) -> None:
        """The request has come back and cost `paid`."""
        async with self._changed:
            self._aside = max(0.0, self._aside - self.prices.most(request))
            if self._aside < 1e-12:  # what is left of sums and differences of floats
                self._aside = 0.0
            self.spent += paid
            self._changed.notify_all()


def usage_of(request: Request, answer: dict[str, Any]) -> tuple[dict[str, int], bool]:
    """(tokens paid for, whether they are an estimate because the endpoint did not say)."""
    if answer["usage"] is not None:
        return answer["usage"], False
    return {"prompt_tokens": request.prompt_tokens, "completion_tokens": estimated_tokens(answer["text"])}, True
