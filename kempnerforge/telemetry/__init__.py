"""What a run tells about itself: timers, FLOP/s arithmetic, and the places that metric rows go to.

A *row* is a mapping with ``step`` and metrics under the names ``group/metric``, the unit last
(``time/data_s``, ``checkpoint/size_bytes``). Every sink is handed the same rows and decides what to do
with them. No module here imports torch, except ``spans`` when it times a CUDA device.

``spans`` timers · ``flops`` peak FLOP/s and MFU · ``sinks`` the protocol and the fan-out · ``jsonl``
metrics.jsonl and reading it back · ``console`` and ``console_text`` · ``wandb_sink``
"""
