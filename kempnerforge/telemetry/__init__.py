"""Metrics of a run: timers, FLOP/s arithmetic, and sinks for metric rows.

A *row* is a mapping with ``step`` and metrics named ``group/metric``, with the unit last
(``time/data_s``, ``checkpoint/size_bytes``). Every sink gets the same rows and chooses how to show
them. No module in this package imports torch, except ``spans`` when it times a CUDA device.

``spans``: timers. ``flops``: peak FLOP/s and MFU. ``sinks``: the sink protocol and the set of all
sinks. ``jsonl``: writing and reading metrics.jsonl. ``console``, ``console_text`` and
``wandb_sink``: other sinks.
"""
