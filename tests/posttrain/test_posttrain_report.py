"""The report's section on conversations, over a root made by hand."""

import re
from dataclasses import dataclass
from typing import Any

from mixtures.posttrain.sft import STAGE as SFT
from pipelines.report.posttrain import conversations
from tests.posttrain.conftest import House, turns
from tests.posttrain.test_exports import judged


@dataclass
class Told:
    """What the section reads of `Facts`."""

    datasets: tuple[Any, ...]
    layers: dict[str, dict[str, Any]]
    fate: str | None
    done: dict[str, Any]

    def of(self, stage: str) -> Any:
        return self.done.get(stage)


def test_counts_by_domain_reason_and_rate(house: House) -> None:
    sums = [turns(f"{i} + 1?", f"\\boxed{{{i + 1}}}", domain="<sums>", passes=i, attempts=8) for i in range(4)]
    judged(house, [*sums, turns("DROPPED", "x", domain="other")])
    outcome = house.run(SFT)
    ran = type("Ran", (), {"manifest": outcome})()
    layers = {"chats": dict.fromkeys(("chat", "fate@final"))}
    html = conversations(Told((house.dataset("chats"),), layers, "fate@final", {"sft": ran}))  # type: ignore[arg-type]
    assert "<sums>" not in html  # text of records is escaped
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    assert "5 conversations, 4 stay" in text
    assert "chats &lt;sums&gt; 4 4 100.0 %" in text
    assert "chats other rule 1 1 0" in text
    assert "Pass rates of 4 tasks" in text
    assert "sft 4 4" in text


def test_nothing_is_shown_without_conversations(house: House) -> None:
    assert conversations(Told((), {}, None, {})) == ""  # type: ignore[arg-type]
