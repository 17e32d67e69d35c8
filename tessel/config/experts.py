"""How a mixture of experts routes and balances: a section of frozen dataclasses, as in `run.py`."""

from __future__ import annotations

from dataclasses import dataclass

from tessel.config.field import option

LOAD_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none", "softmax_topk", "pai_megatron_aux_loss")
# MindSpeed's names for a softmax over all experts with no auxiliary loss, and with Megatron's.
PRE_SOFTMAX = ("softmax_topk", "pai_megatron_aux_loss")
DISPATCHERS = ("allgather", "alltoall", "alltoall_seq", "flex")


@dataclass(frozen=True)
class Experts:
    """Mixture of experts. How many experts there are is read from config.json; coefficients count only if given."""

    moe_router_load_balancing_type: str = option(
        "aux_loss",
        "level of the auxiliary loss: micro-batch, sequence (seq_), or global batch (global_); softmax_topk and "
        "pai_megatron_aux_loss are MindSpeed's none and aux_loss with --moe-router-pre-softmax",
        choices=LOAD_BALANCING,
    )
    moe_aux_loss_coeff: float = option(0.0, "weight of the auxiliary load balancing loss; 0 is off")
    moe_z_loss_coeff: float | None = option(None, "weight of the router's z-loss; none if not given")
    moe_router_score_function: str | None = option(
        None, "what the router scores by; the model's own if not given: softmax", choices=("softmax", "sigmoid")
    )
    moe_router_pre_softmax: bool = option(
        False, "softmax over all experts, not over the chosen ones: their weights don't add up to 1"
    )
    moe_router_topk_scaling_factor: float | None = option(None, "factor on the weights of the chosen experts")
    moe_router_enable_expert_bias: bool = option(
        False, "choose by score plus a bias that follows the load, without an auxiliary loss (with sigmoid)"
    )
    moe_router_bias_update_rate: float = option(1e-3, "change of that bias in one step")
    moe_router_dtype: str | None = option(
        None, "dtype of the router's scores; that of the computation if not given", choices=("fp32", "fp64")
    )
    moe_expert_capacity_factor: float | None = option(
        None, "drop tokens beyond this multiple of an even share of an expert; none are dropped if not given"
    )
    moe_token_drop_policy: str = option(
        "probs", "which are dropped: those of least weight, or the last ones", choices=("probs", "position")
    )
    moe_pad_expert_input_to_capacity: bool = option(
        False, "accepted: inputs are never padded here, which changes no number"
    )
    moe_token_dispatcher_type: str | None = option(
        None, "accepted: tokens always travel by all-to-all", choices=DISPATCHERS
    )
