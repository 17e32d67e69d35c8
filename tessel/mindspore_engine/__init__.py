"""`tessel pretrain --ai-framework mindspore`: forward, backward and update by MindSpore.

Everything else of a run is the torch engine's own: data, schedule, loop, log, checkpoints. Only `support` may be
imported where MindSpore is not installed.
"""
