"""The grid: who stands where, in whose order, and how many process groups it costs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from layouts.pool import Process

from megatron.errors import UserError
from megatron.parallel.context import AXES, Axis, ParallelContext

# World, tp, pp.
LAYOUTS = [(8, 1, 1), (8, 8, 1), (8, 2, 1), (8, 1, 2), (8, 2, 2), (12, 2, 3), (16, 4, 2)]


def survey(path: str, layouts: list[tuple[int, int, int]], engine: str) -> int:
    """Write what every rank of a fake world sees: places, groups of the axes, and calls that make groups."""
    import torch.distributed as dist
    from torch.distributed import device_mesh, distributed_c10d
    from torch.testing._internal.distributed.fake_pg import FakeStore

    made: list[object] = []
    original = dist.new_group

    def new_group(ranks: list[int] | None = None, **options: object) -> object:
        made.append(ranks)
        options.update(backend="fake", timeout=None)  # the control group is gloo, which would look for its peers
        return original(ranks, **options)

    for module in (dist, device_mesh, distributed_c10d):
        module.new_group = new_group  # type: ignore[attr-defined]
    found = []
    for world, tp, pp in layouts:
        for rank in range(1 if engine else world):
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
            made.clear()
            context = ParallelContext.create(tp_size=tp, pp_size=pp)
            axes = {name: getattr(context, name) for name in AXES}
            of_engine = made_by_engine(context, made, engine) if engine else 0
            found.append(
                {
                    "layout": [world, tp, pp],
                    "rank": context.rank,
                    "place": {name: (axis.rank, axis.size) for name, axis in axes.items()},
                    "groups": {
                        n: dist.get_process_group_ranks(a.group) for n, a in axes.items() if a.group is not None
                    },
                    "made": len(made) - of_engine,
                    "of_engine": of_engine,
                }
            )
            dist.destroy_process_group()
    Path(path).write_text(json.dumps(found))
    return 0


def made_by_engine(context: ParallelContext, made: list[object], engine: str) -> int:
    """Calls of an engine that make groups."""
    from dataclasses import replace

    from layouts.jobs import flags

    from megatron.objectives import build_objective, parse
    from megatron.training.engine import build_engine

    size = {"tp_size": context.tp.size, "pp_size": context.pp.size, "micro_batch_size": 1, "engine": engine}
    argv = flags(Path("/"), None, global_batch_size=16, num_attention_heads=8, num_query_groups=8, **size)
    config = parse(argv, objective="mdm", world_size=context.world_size)
    config = replace(
        config,
        model=replace(config.model, padded_vocab_size=512),
        objective=replace(config.objective, mask_token_id=500),
        optimizer=replace(config.optimizer, lr_decay_samples=80),
    )
    before = len(made)
    build_engine(config, build_objective(config), context)
    return len(made) - before


def start_as_on_cuda(path: str, world_sizes: list[int]) -> int:
    """Write how many calls that make groups the last rank of fake worlds makes; the world is bound to a device, as NCCL's is."""
    import torch
    import torch.distributed as dist
    from torch.distributed import device_mesh, distributed_c10d
    from torch.testing._internal.distributed.fake_pg import FakeStore

    calls = {"new_group": 0, "split_group": 0}
    original = dist.new_group

    def make(ranks: list[int] | None) -> object:
        world = distributed_c10d._get_default_group()
        world.bound_device_id = None  # there is no device to split on
        made = original(ranks, backend="fake")
        world.bound_device_id = torch.device("cuda", 0)
        return made

    def new_group(ranks: list[int] | None = None, **_: object) -> object:
        calls["new_group"] += 1
        return make(ranks)

    def split_group(*_: object, split_ranks: list[list[int]], **__: object) -> object:
        calls["split_group"] += 1
        return make(next(ranks for ranks in split_ranks if dist.get_rank() in ranks))

    for module in (dist, device_mesh, distributed_c10d):
        module.new_group, module.split_group = new_group, split_group  # type: ignore[attr-defined]
    torch.accelerator.is_available = torch.cuda.is_available = lambda: True  # type: ignore[assignment]
    found = []
    for world_size in world_sizes:
        dist.init_process_group("fake", store=FakeStore(), rank=world_size - 1, world_size=world_size)
        distributed_c10d._get_default_group().bound_device_id = torch.device("cuda", 0)
        context = ParallelContext.create(tp_size=8, pp_size=4 if world_size > 32 else 1, device=torch.device("cpu"))
        assert context.tp.group is not None and dist.get_world_size(context.tp.group) == 8
        found.append([world_size, dict(calls)])
        if world_size == 8:
            alone = context.replicas()
            assert dist.get_process_group_ranks(alone) == [7] and calls["split_group"] == 1
        calls.update(dict.fromkeys(calls, 0))
        dist.destroy_process_group()
    Path(path).write_text(json.dumps(found))
    return 0


def test_on_cuda_the_calls_do_not_grow_with_the_world(tmp_path: Path) -> None:
    """One split for each axis that is longer than one and shorter than the world, and the control group."""
    process = Process(start_as_on_cuda, str(tmp_path / "found.json"), [8, 64, 512, 4096])
    assert process.wait(60) == 0, process.output
    splits = {8: 0, 64: 3, 512: 3, 4096: 3}
    assert json.loads((tmp_path / "found.json").read_text()) == [
        [world_size, {"new_group": 1, "split_group": count}] for world_size, count in splits.items()
    ]


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, int], list[dict]]:
    path = tmp_path_factory.mktemp("grid") / "found.json"
    process = Process(survey, str(path), LAYOUTS, "")
    assert process.wait(60) == 0, process.output
    found: dict[tuple[int, int, int], list[dict]] = {}
    for view in json.loads(path.read_text()):
        found.setdefault(tuple(view["layout"]), []).append(view)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_order_of_the_grid_is_deepspeeds(surveyed: dict, layout: tuple[int, int, int]) -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    world, tp, pp = layout
    topology = PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=world // (tp * pp))
    for view in surveyed[layout]:
        theirs = topology.get_coord(view["rank"])
        ours = {name: rank for name, (rank, _) in view["place"].items()}
        assert ours == {"pp": theirs.pipe, "dp": theirs.data, "ep": 0, "cp": 0, "tp": theirs.model}
        names = {"pp": "pipe", "dp": "data", "tp": "model"}
        for axis, ranks in view["groups"].items():
            assert ranks in topology.get_axis_comm_lists(names[axis]) and view["rank"] in ranks


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_group_exists_only_where_an_axis_is_long(surveyed: dict, layout: tuple[int, int, int]) -> None:
    """Every group costs a communicator on a GPU; the one axis of a world of replicas is the world itself."""
    world, tp, pp = layout
    sizes = {"pp": pp, "dp": world // (tp * pp), "tp": tp}
    lines = sum(world // size for size in sizes.values() if 1 < size < world)
    for view in surveyed[layout]:
        assert sorted(view["groups"]) == sorted(name for name, size in sizes.items() if size > 1)
        assert view["made"] == lines + 1  # and the control group


# Groups that an engine makes besides, by (world, tp, pp): DeepSpeed's copy of the world, one a rank where dp is 1 (both want a
# real group), and what its pipelines make for themselves.
ENGINE_GROUPS = {
    "deepspeed": {(8, 1, 1): 1, (8, 2, 1): 0, (8, 8, 1): 8, (8, 1, 2): 23, (8, 2, 2): 19},
    "fsdp2": {(8, 1, 1): 0, (8, 2, 1): 0, (8, 8, 1): 8},
}


@pytest.mark.parametrize("engine", list(ENGINE_GROUPS))
def test_an_engine_makes_few_groups(tmp_path: Path, engine: str) -> None:
    process = Process(survey, str(tmp_path / "found.json"), list(ENGINE_GROUPS[engine]), engine)
    assert process.wait(120) == 0, process.output
    found = {tuple(view["layout"]): view["of_engine"] for view in json.loads((tmp_path / "found.json").read_text())}
    assert found == ENGINE_GROUPS[engine]


def test_a_process_alone_has_no_groups() -> None:
    context = ParallelContext.create()
    assert all(getattr(context, name) == Axis() for name in AXES)
    assert context.control_group is None and context.is_first_rank
    assert context.gather_objects(3) == [3]


def test_a_world_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"1 processes cannot hold tensor-parallel 2 x pipeline 3; .* multiple of 6; start"
    ):
        ParallelContext.create(tp_size=2, pp_size=3)


def test_axes_end() -> None:
    assert [axis.is_last for axis in (Axis(), *itertools.starmap(Axis, [(0, 2), (1, 2)]))] == [True, False, True]
