"""Any number of ranks trains what one rank trains: weights, loss, norm, biases, state files; and a death is noticed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import ConfigError
from moe import optim
from moe.config import OptimConfig
from moe.parallel import World
from tests.moe import ranks

TOLERANCE = {"fp32": 1e-6, "fp64": 1e-12}
DTYPE = {"fp32": torch.float32, "fp64": torch.float64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """One rank's runs; the fp64 one is also the file that other worlds go on from."""
    found = {name: ranks.train_steps(World.alone(), dtype) for name, dtype in DTYPE.items()}
    found["bf16"] = ranks.train_steps(World.alone(), torch.bfloat16)
    adamw = OptimConfig(optimizer="adamw", grad_clip=0.3)
    found["adamw"] = ranks.train_steps(World.alone(), torch.float64, adamw)
    torch.save(found["fp64"], folder / "one.pt")
    found["resumed"] = ranks.train_steps(World.alone(), torch.float64, start=found["fp64"])
    return found


def _run(folder: Path, size: int, work: Any, name: str) -> dict[str, Any]:
    codes = ranks.run_ranks(size, work, folder)
    errors = "\n".join(p.read_text() for p in folder.glob("error-*"))
    assert codes == [0] * size, f"{codes}\n{errors}"
    found: dict[str, Any] = torch.load(folder / name)
    return found


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Any]) -> dict[str, Any]:
    return _run(folder, 2, ranks.two_ranks, "two.pt")


@pytest.fixture(scope="module")
def four(folder: Path, one: dict[str, Any]) -> dict[str, Any]:
    return _run(folder, 4, ranks.four_ranks, "four.pt")


def _same(ours: dict[str, Any], theirs: dict[str, Any], atol: float) -> None:
    for part in ("weights", "state"):
        assert ours[part].keys() == theirs[part].keys()
        for name, value in ours[part].items():
            torch.testing.assert_close(value, theirs[part][name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    for part in ("losses", "norms"):
        torch.testing.assert_close(ours[part], theirs[part], atol=10 * atol, rtol=0)
    for a, b in zip(ours["bias"], theirs["bias"], strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["fp32", "fp64"])
def test_two_replicas_equal_one_rank(one: dict[str, Any], two: dict[str, Any], name: str) -> None:
    assert (one[name]["norms"] > ranks.OPTIM.grad_clip).all(), "clipping was at work"
    _same(two[name], one[name], TOLERANCE[name])


def test_two_replicas_equal_one_rank_with_adamw_for_all(one: dict[str, Any], two: dict[str, Any]) -> None:
    _same(two["adamw"], one["adamw"], 1e-11)


def test_two_replicas_of_low_precision_stay_near(one: dict[str, Any], two: dict[str, Any]) -> None:
    """bf16 sums differ in their last bit, which Muon may carry to small singular values: the loss is held instead."""
    torch.testing.assert_close(two["bf16"]["losses"], one["bf16"]["losses"], atol=0.02, rtol=0)
    assert two["bf16"]["state"].keys() == one["bf16"]["state"].keys()


def test_split_experts_equal_one_rank(one: dict[str, Any], two: dict[str, Any], four: dict[str, Any]) -> None:
    assert four["places"] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    _same(two["split"], one["fp32"], TOLERANCE["fp32"])
    _same(four["fp64"], one["fp64"], TOLERANCE["fp64"])


def test_readings_of_the_experts_are_over_all_of_them(two: dict[str, Any]) -> None:
    """Ranks with two of four experts each would compare them in pairs, and replicas miss what others' rows show."""
    alone = ranks.one_update(World.alone())["experts"]
    assert alone["rms_min_median"][0] == 0.0
    assert alone["rms_max_median"][1] > 4.0
    for row in two["updates"]:
        for name in ("rms_min_median", "rms_max_median", "dead_fraction"):
            assert row["experts"][name] == pytest.approx(alone[name], rel=1e-4), name
        assert row["experts"]["load"] == alone["load"]


def test_four_replicas_equal_one_rank(one: dict[str, Any], four: dict[str, Any]) -> None:
    _same(four["plain"], one["fp64"], TOLERANCE["fp64"])


def test_one_ranks_file_is_continued_by_two_and_by_split_experts(
    one: dict[str, Any], two: dict[str, Any], four: dict[str, Any]
) -> None:
    assert one["resumed"]["state"]["updates"].item() == 2 * ranks.STEPS
    for world in (two, four):
        _same(world["resumed"], one["resumed"], TOLERANCE["fp64"])


def test_state_is_shared_out(one: dict[str, Any], two: dict[str, Any], four: dict[str, Any]) -> None:
    whole = one["fp64"]["state_bytes"][0]
    for found, size in ((two["fp64"], 2), (four["fp64"], 4), (four["plain"], 4)):
        assert sum(found["state_bytes"]) == whole
        assert max(found["state_bytes"]) < 1.15 * whole / size
    assert two["values"] == [0, 10]


def test_a_rank_that_receives_nothing_takes_part(four: dict[str, Any]) -> None:
    """Three rows of each rank go to its team's second member, who multiplies by 3 and adds the 6 rows it has."""
    for rank, (values, gradient) in enumerate(four["swap"]):
        assert values == [3.0 * (row + 10 * rank) + 6.0 for row in range(3)]
        assert gradient == [3.0] * 3


def test_a_dead_rank_ends_the_others_with_a_message(tmp_path: Path) -> None:
    codes = ranks.run_ranks(2, ranks.a_rank_dies, tmp_path)
    assert codes == [1, -9]
    message = (tmp_path / "error-0").read_text()
    assert "StageError: train: the ranks lost each other" in message
    assert "start all again" in message


def test_alone_changes_nothing() -> None:
    world = World.alone()
    value = torch.arange(3.0)
    assert (world.rank, world.size, world.gather(4)) == (0, 1, [4])
    assert world.sum(value) is value
    world.wait()
    world.close()


def test_places_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="expert_ranks: must divide the ranks, got 2 for 3"):
        World.from_env(expert_ranks=2)
    if torch.cuda.device_count() < 64:
        monkeypatch.setenv("LOCAL_RANK", "63")
        with pytest.raises(ConfigError, match="local rank 63 has no GPU"):
            World.from_env(device="cuda")


def test_experts_that_cannot_be_split_are_refused() -> None:
    from moe.exchange import split_experts
    from moe.model import Decoder
    from moe.parallel import Team

    world = World(torch.device("cpu"), Team(0, 3), Team(0, 3), Team())
    with pytest.raises(ConfigError, match="must divide the experts, got 3 for 4"):
        split_experts(Decoder(ranks.CONFIG), world)
    assert optim.build(Decoder(ranks.CONFIG), ranks.OPTIM).state_bytes == 0
