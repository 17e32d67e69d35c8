"""A part of the model: what one stage of a pipeline keeps."""

from __future__ import annotations

from tessel.layout.stages import Stage
from tessel.model.transformer import Transformer


def keep_stage(model: Transformer, stage: Stage) -> Transformer:
    """Delete from a whole model what `stage` does not run, in place; returns it.

    The names of what is left are those of the whole model. A stage keeps its layers, the first one the
    embedding, the last one norm and head; a tied embedding is the last one's head, so both keep it. A stage may
    have no layers. What its forward takes and returns is written at `Transformer.forward`.
    """
    for number in set(model.layers) - {str(layer) for layer in stage.layers}:
        del model.layers[number]
    decoder = model.model
    decoder.is_first, decoder.is_last = stage.is_first, stage.is_last
    is_tied_head = stage.is_last and model.lm_head is None
    if not (stage.is_first or is_tied_head):
        del decoder.embed_tokens
    if not stage.is_last:
        del decoder.norm
        model.lm_head = None
    decoder.save_memory()
    return model
