"""Training on a GPU: graphed, eager, compiled, in half precision, cut and gone on. Run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from test_engine import Tensors, assert_same_weights, sequences

from smpconv_zoo.training.engine import Engine
from smpconv_zoo.training.recipe import make_recipe
from smpconv_zoo.training.run_folder import RunFolder
from smpconv_zoo.training.world import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, there is none"),
]

PICTURES = {"network": "test_smpconv", "data": "pictures", "optimizer": "adamw", "ema_decay": 0.9, "clip_grad": 1.0}
SERIES = {"network": "test_smpconv_tcn", "data": "series", "optimizer": "adam"}


def engine(folder: Path | None, cut: int | None = None, **changes: Any) -> Engine:
    values = {"epochs": 3, "batch_size": 8, "lr": 3e-3, "warmup_epochs": 1, "weight_decay": 1e-2, **changes}
    recipe = make_recipe(f"{values['network']}.tiny", values)
    torch.manual_seed(recipe.seed)
    world = World(torch.device("cuda", 0))
    model = timm.create_model(recipe.network, **recipe.arguments).to(world.device)
    if recipe.network == "test_smpconv":
        generator = torch.Generator().manual_seed(1)
        y = torch.randint(0, model.num_classes, (44,), generator=generator)
        size = model.pretrained_cfg["input_size"]
        x = torch.randn((44, *size), generator=generator) + y.view(-1, 1, 1, 1) / 3
    else:
        x, y = sequences()
    data = Tensors(x.to(world.device), y.to(world.device), recipe.batch_size // recipe.micro_batches, world)

    def die(done: int, total: int) -> None:
        if done == cut:
            raise KeyboardInterrupt

    run = None
    if folder is not None:
        run = RunFolder(folder)
        run.check(recipe, resume=True)
        run.start(recipe, "cuda", 1, {})
    return Engine(recipe, model, data, world, run, save_every=2, on_step=die)


@pytest.mark.parametrize(
    "changes",
    [
        SERIES,
        {**SERIES, "graph": False},
        {**PICTURES, "graph": True, "dtype": "bfloat16", "channels_last": True},
        {**PICTURES, "dtype": "float16", "channels_last": True},
        {**PICTURES, "micro_batches": 2},
    ],
    ids=["series, graph", "series, eager", "pictures, graph, bfloat16", "pictures, float16", "pictures, in parts"],
)
def test_a_run_that_was_cut_goes_on_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    unbroken = engine(tmp_path / "unbroken", **changes)
    unbroken.fit()
    assert unbroken.step.graphed == changes.get("graph", changes is SERIES)
    for cut in (5, 8):
        with pytest.raises(KeyboardInterrupt):
            engine(tmp_path / str(cut), cut, **changes).fit()
        torch.manual_seed(99)
        again = engine(tmp_path / str(cut), **changes)
        again.resume()
        again.fit()
        assert_same_weights(again.model, unbroken.model)
        assert_same_weights(again.measured, unbroken.measured)


@pytest.mark.parametrize(
    ("one", "other", "tolerance"),
    [
        # The same kernels, launched one by one or as a graph.
        ({**PICTURES, "graph": True}, {**PICTURES, "graph": False}, 1e-5),
        # Fused kernels round otherwise.
        ({**PICTURES, "compile": True}, PICTURES, 1e-3),
        ({**SERIES, "compile": True}, {**SERIES, "graph": False}, 1e-3),
        # 8 and 11 bits.
        ({**PICTURES, "dtype": "bfloat16", "compile": True, "channels_last": True}, PICTURES, 2e-2),
        ({**PICTURES, "dtype": "float16"}, PICTURES, 1e-2),
        ({**SERIES, "dtype": "float16"}, SERIES, 1e-2),
    ],
    ids=["graph", "compiled", "compiled series", "compiled bfloat16", "float16", "float16 series"],
)
def test_two_ways_to_run_learn_the_same(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    losses = [engine(None, **changes).fit().last.train_loss for changes in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
