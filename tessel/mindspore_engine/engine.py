"""From a source of weights to what a run trains by MindSpore: `build_learner`, in place of the torch engine's.

Weights come in and leave as torch tensors in host memory, under their Hugging Face names and cut by the sharding
table, so that every format of checkpoint is read and written by the code that the torch engine uses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, cast

import mindspore as ms
import torch
from torch import Tensor, nn

from tessel.config.run import RunConfig
from tessel.layout.adapters import AdapterSpec
from tessel.layout.asked import stages_asked
from tessel.layout.sharding import parameters as sharding_rules
from tessel.layout.stages import Stage
from tessel.layout.tiles import Tile, num_padding_elements
from tessel.layout.topology import Place, Topology
from tessel.mindspore_engine import start
from tessel.mindspore_engine.collectives import Groups, TensorParallel
from tessel.mindspore_engine.model import EMBEDDING, FINAL_NORM, HEAD, Decoder
from tessel.mindspore_engine.optimizer import Gradients, Optimizer
from tessel.mindspore_engine.runner import StageRunner
from tessel.mindspore_engine.support import check_model
from tessel.model.balance import Balance, RouterOptions
from tessel.model.config import ModelConfig
from tessel.parallel.gradients import num_copies
from tessel.parallel.groups import Groups as HostGroups
from tessel.parallel.peers import Peers
from tessel.runtime.log import log
from tessel.train.adapting import Adapting
from tessel.train.learner import Learner
from tessel.train.optimizer import parameter_groups
from tessel.train.setup import compute_dtype, load_weights, tiles_of
from tessel.train.source import Source

_DTYPES = {torch.float32: ms.float32, torch.bfloat16: ms.bfloat16}


class MindSporeLearner(Learner):
    """A `Learner` whose tensors are MindSpore's; `optimizer` and `gradients` answer what is asked of torch's."""

    @property
    def _optimizer(self) -> Optimizer:
        return cast(Optimizer, self.optimizer)

    @property
    def adapters(self) -> AdapterSpec | None:
        """None: the whole model is trained."""
        return None

    def weights(self) -> dict[str, Tensor]:
        """This process's parameters by name, fp32, in host memory: on a CPU not copies."""
        groups = self._optimizer.param_groups
        pairs = [pair for group in groups for pair in zip(group["names"], group["params"], strict=True)]
        return {name: _to_torch(parameter) for name, parameter in pairs}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """See `Learner`; `keep_optimizer` takes over what was loaded into them."""
        steps = {f"optimizer.step.{name}": torch.tensor(float(n)) for name, n in self._optimizer.steps.items()}
        return steps | {f"optimizer.{name}": _to_torch(value) for name, value in self._optimizer.state.items()}

    def keep_optimizer(self, loaded: Mapping[str, Tensor]) -> None:
        """See `Learner`."""
        for name in self._optimizer.steps:
            self._optimizer.steps[name] = int(loaded[f"optimizer.step.{name}"])
        for name, value in self._optimizer.state.items():
            value.set_data(_to_mindspore(loaded[f"optimizer.{name}"]))


def build_learner(
    cfg: RunConfig,
    model_config: ModelConfig,
    source: Source,
    device: torch.device,
    groups: HostGroups | None,
    stack: contextlib.ExitStack,
    adapting: Adapting | None = None,
) -> Learner:
    """This process's stage and tile of the model with the weights of `source`, and what trains it.

    `groups` are torch's, of host memory, for counts and losses; MindSpore makes its own for activations and gradients.
    """
    del stack
    assert adapting is None
    check_model(model_config)
    log(start.describe())
    dtype = compute_dtype(cfg.precision)
    topology, place = (Topology(), Place()) if groups is None else (groups.topology, groups.place)
    (stage,) = stages_asked(cfg.layout, model_config.num_hidden_layers).of_rank(place.pp)
    tiles = tiles_of(model_config, groups)
    parameters = _load(_names_of(stage, model_config), tiles, model_config, source, cfg, device)
    own = None if groups is None else Groups.of(topology, groups.rank, model_config.num_key_value_heads)
    parallel = TensorParallel(None if own is None else own.tp, cfg.layout.sequence_parallel)
    recompute = cfg.kernels.recompute_granularity == "full"
    decoder = Decoder(model_config, stage, parameters, parallel, _DTYPES[dtype], recompute)
    peers, rules = Peers(groups), sharding_rules(model_config)
    copies = {} if groups is None else {name: num_copies(rules[name], groups) for name in parameters}
    padding = sum(num_padding_elements(rule, topology) for rule in rules.values())
    gradients = Gradients(parameters, rules, peers, own, copies, padding, cfg.layout.sequence_parallel)
    optimizer = Optimizer(parameter_groups(parameters.items(), model_config, cfg.optimizer), cfg.optimizer, gradients)
    ranks = (0,) if own is None else own.stages
    return MindSporeLearner(
        parts=(),
        optimizer=cast(Any, optimizer),
        scaler=None,
        dtype=dtype,
        runner=StageRunner(decoder, list(parameters.values()), gradients, ranks, place.pp),
        gradients=cast(Any, gradients),
        peers=peers,
        tiles=tiles,
        balance=Balance(model_config, RouterOptions.from_options(cfg.experts)),
    )


def _names_of(stage: Stage, config: ModelConfig) -> list[str]:
    """The parameters of a stage; a tied embedding is on the first and on the last."""
    ends = {EMBEDDING: stage.is_first or (stage.is_last and config.tie_word_embeddings)}
    ends |= {FINAL_NORM: stage.is_last, HEAD: stage.is_last}
    return [
        name
        for name in sharding_rules(config)
        if ends.get(name, False) or (name.startswith("model.layers.") and int(name.split(".")[2]) in stage.layers)
    ]


def _load(
    names: Iterable[str],
    tiles: Mapping[str, Tile],
    model_config: ModelConfig,
    source: Source,
    cfg: RunConfig,
    device: torch.device,
) -> dict[str, ms.Parameter]:
    """The named parameters, filled by what fills a torch model."""
    holder = nn.Module()
    for name in names:
        module, (*path, leaf) = holder, name.split(".")
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(torch.empty(tiles[name].local_shape, device="meta")))
    load_weights([holder], tiles, model_config, source, cfg, device)
    return {name: ms.Parameter(_to_mindspore(held), name=name) for name, held in holder.named_parameters()}


def _to_torch(value: ms.Tensor) -> Tensor:
    return torch.from_numpy(value.asnumpy())


def _to_mindspore(value: Tensor) -> ms.Tensor:
    return ms.Tensor(value.detach().contiguous().numpy().copy())
