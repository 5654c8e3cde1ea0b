"""Rules that span several keys. Each is a pure function from sections to issues.

The parameters of a rule name its inputs: sections, ``world_size`` (number of processes; None if
unknown) and ``environ`` (None if the check does not run inside the job). A rule runs if all its
sections are valid, so that one invalid section hides as few issues as possible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from kempnerforge.config import checkpoint_rules, optimizer_rules
from kempnerforge.config.data import DataConfig
from kempnerforge.config.data_sources import phase_issues, source_issues
from kempnerforge.config.distributed import DistributedConfig
from kempnerforge.config.evaluation import EvalConfig
from kempnerforge.config.model import COMMON_KEYS, ModelConfig
from kempnerforge.config.parallel_dims import batch_faults, derive_geometry, microbatch_faults
from kempnerforge.config.pipeline_stages import STAGES_PER_RANK, num_stages
from kempnerforge.config.run import PLACEHOLDER, PLACEHOLDERS, RunConfig, unfilled_placeholders
from kempnerforge.config.scheduler import SchedulerConfig
from kempnerforge.config.suggestions import nearest
from kempnerforge.config.train import TrainConfig
from kempnerforge.errors import ConfigIssue

BYTE_VOCABULARY = 257
"""256 bytes and the document separator."""


def check_rules(known: Mapping[str, Any]) -> list[ConfigIssue]:
    """Run each rule whose parameters are all in ``known`` (valid sections, ``world_size``, ``environ``)."""
    faults: list[ConfigIssue] = []
    for rule in RULES:
        needs = signature(rule).parameters
        if all(name in known for name in needs):
            faults += rule(**{name: known[name] for name in needs})
    return faults


def run_dir_expands(run: RunConfig, environ: Mapping[str, str] | None) -> list[ConfigIssue]:
    """Require known placeholders in ``run.dir`` and, inside the job, a value for each of them."""
    if run.dir is None:
        return []
    faults = []
    for name in PLACEHOLDER.findall(run.dir):
        if name not in PLACEHOLDERS:
            close = nearest(name, list(PLACEHOLDERS))
            hint = f"did you mean {{{close}}}?" if close else "known: {job_id}, {array_task_id}"
            faults.append(ConfigIssue("run.dir", f"{{{name}}} is not a known placeholder", hint))
    return faults + (unfilled_placeholders(run.dir, environ) if environ is not None else [])


def model_keys_apply(model: ModelConfig) -> list[ConfigIssue]:
    """Require ``COMMON_KEYS`` alone for a model of the user's, and no ``args`` for "llama"."""
    if model.is_llama:
        if not model.args:
            return []
        return [
            ConfigIssue("model.args", "are for a model of your own", 'write the keys of "llama" in [model]')
        ]
    return [
        ConfigIssue(
            f"model.{key}",
            f'is a key of "llama", and model.name is "{model.name}"',
            f"write model.args.{key}",
        )
        for key in sorted(model.model_fields_set.difference(COMMON_KEYS))
    ]


def heads_fit(model: ModelConfig) -> list[ConfigIssue]:
    """Require heads that divide ``dim`` and key/value heads evenly, and an even head width.

    Rotary embeddings rotate pairs of elements.
    """
    if not model.is_llama:
        return []
    faults = []
    if model.n_heads % model.kv_heads:
        fits = [count for count in range(1, model.n_heads + 1) if model.n_heads % count == 0]
        problem = f"{model.kv_heads} does not divide n_heads {model.n_heads}"
        faults.append(ConfigIssue("model.n_kv_heads", problem, f"allowed: {', '.join(map(str, fits))}"))
    if model.head_dim is None and model.dim % model.n_heads:
        problem = f"{model.dim} does not divide by n_heads {model.n_heads}"
        lower = model.dim // model.n_heads * model.n_heads
        near = " or ".join(str(dim) for dim in (lower, lower + model.n_heads) if dim)
        faults.append(ConfigIssue("model.dim", problem, f"{near} would fit, or set head_dim"))
    elif model.resolved_head_dim % 2:
        key, how = ("dim", "dim / n_heads") if model.head_dim is None else ("head_dim", "head_dim")
        problem = f"{how} is {model.resolved_head_dim}, and rotary embeddings need an even number"
        faults.append(ConfigIssue(f"model.{key}", problem, "set head_dim to an even number"))
    return faults


def rope_scaling_is_ordered(model: ModelConfig) -> list[ConfigIssue]:
    """Require ``high_freq_factor`` above ``low_freq_factor``."""
    scaling = model.rope_scaling
    if scaling is None or scaling.high_freq_factor > scaling.low_freq_factor:
        return []
    problem = f"{scaling.high_freq_factor} is not above low_freq_factor {scaling.low_freq_factor}"
    return [ConfigIssue("model.rope_scaling.high_freq_factor", problem, "Llama 3.1 has 4 above 1")]


def sequence_fits_model(model: ModelConfig, train: TrainConfig) -> list[ConfigIssue]:
    """Require sequences that are no longer than the model supports."""
    if not model.is_llama or train.seq_len <= model.max_seq_len:
        return []
    problem = f"{train.seq_len} is longer than model.max_seq_len {model.max_seq_len}"
    return [
        ConfigIssue("train.seq_len", problem, f"allowed: at most {model.max_seq_len}, or raise max_seq_len")
    ]


LOSS_ARGUMENTS: dict[str, dict[str, type]] = {
    "cross_entropy": {},
    "chunked_cross_entropy": {"chunk_tokens": int, "recompute": bool},
}
"""Arguments of KempnerForge's own losses, which are checked without importing torch."""


def loss_arguments_fit(train: TrainConfig) -> list[ConfigIssue]:
    """Require arguments that KempnerForge's own losses take. The z-loss has a key of its own."""
    faults = []
    known = LOSS_ARGUMENTS.get(train.loss)
    for name, value in train.loss_args.items():
        key = f"train.loss_args.{name}"
        if name == "z_loss":
            faults.append(ConfigIssue(key, "has a key of its own", "set train.z_loss"))
        elif known is not None and name not in known:
            takes = ", ".join(known) or "none"
            faults.append(ConfigIssue(key, f"{train.loss} has no argument {name}", f"it takes: {takes}"))
        elif known is not None and type(value) is not known[name]:
            kind = "an integer" if known[name] is int else "true or false"
            faults.append(ConfigIssue(key, f"{value!r} is not {kind}"))
        elif known is not None and known[name] is int and int(str(value)) < 1:
            faults.append(ConfigIssue(key, f"{value} is too small", "allowed: at least 1"))
    return faults


def data_has_one_source(data: DataConfig) -> list[ConfigIssue]:
    """Require exactly one of text, prepared tokens, a dataset of the user's and a mixture, and no keys of
    the last two without them."""
    given = [key for key in ("text", "dataset_path", "dataset", "sources") if getattr(data, key)]
    if not given:
        problem = "none of text, dataset_path, dataset and sources is set"
        return [ConfigIssue("data.text", problem, 'try text = "python-stdlib"')]
    if len(given) > 1:
        problem = f"{' and '.join(given)} are set, and only one of them can be"
        hint = (
            "leave out the others (a mixture: --data.sources=[] --data.phases=[])"
            if data.sources
            else 'set the others to "none"'
        )
        return [ConfigIssue(f"data.{given[0]}", problem, hint)]
    if data.phases and not data.sources:
        return [ConfigIssue("data.phases", "has no effect without data.sources", "leave it out")]
    if data.dataset is not None:
        return []
    names = [name for name in ("args", "val", "num_workers") if getattr(data, name)]
    return [
        ConfigIssue(f"data.{name}", "has no effect without data.dataset", "leave it out") for name in names
    ]


def mixture_is_valid(data: DataConfig) -> list[ConfigIssue]:
    """Require sources and phases that determine the weights at every step."""
    if not data.sources:
        return []
    return source_issues(data.sources) + phase_issues(data.phases, [source.name for source in data.sources])


def sources_are_read(data: DataConfig, eval: EvalConfig) -> list[ConfigIssue]:
    """Require a weight above 0 at some step for each source, or a validation, which reads all sources."""
    if eval.interval or not data.sources or mixture_is_valid(data):
        return []
    drawn = {name for parts in data.weights().values() for name, part in parts.items() if part}
    hint = "give it a weight, leave it out, or set eval.interval to validate on it"
    return [
        ConfigIssue(f"data.sources[{i}].weight", f'nothing reads "{source.name}": it is 0 at all steps', hint)
        for i, source in enumerate(data.sources)
        if source.name not in drawn
    ]


FORMAT_KEYS = {
    "prompt_field": "prompt_completion",
    "completion_field": "prompt_completion",
    "messages_field": "chat",
    "chat_template": "chat",
    "text_field": "text",
    "document_separator": "text",
}
"""Keys of one data.format alone."""


def format_fits_data(data: DataConfig) -> list[ConfigIssue]:
    """Require text for a format of records, a template for chat, and no keys of other formats."""
    faults = [
        ConfigIssue(f"data.{key}", f'has no effect without data.format = "{wanted}"', "leave it out")
        for key, wanted in FORMAT_KEYS.items()
        if data.format != wanted and getattr(data, key) != DataConfig.model_fields[key].default
    ]
    if data.format == "text":
        return faults
    if data.format == "chat" and data.bos_token is not None:
        problem = "has no effect on chats: the chat template writes the token that begins a conversation"
        faults.append(ConfigIssue("data.bos_token", problem, "leave it out"))
    other = next((key for key in ("dataset_path", "dataset") if getattr(data, key) is not None), None)
    if other is not None:
        problem = f'"{data.format}" is a format of data.text, and data.{other} is set'
        faults.append(ConfigIssue("data.format", problem, "leave it out"))
    elif data.sources and all(source.text is None for source in data.sources):
        problem = f'"{data.format}" is a format of text, and all data.sources have prepared tokens'
        faults.append(ConfigIssue("data.format", problem, "leave it out"))
    elif data.format == "chat" and data.tokenizer == "bytes":
        problem = '"bytes" has no chat template, which data.format = "chat" needs'
        faults.append(ConfigIssue("data.tokenizer", problem, "name the folder of a tokenizer.json"))
    return faults


def documents_are_known(data: DataConfig) -> list[ConfigIssue]:
    """Refuse what needs documents for a dataset of the user's, whose samples do not tell theirs."""
    if data.dataset is None:
        return []
    needs = {"document_mask": data.document_mask, "packing": data.packing != "contiguous"}
    problem = f"samples of {data.dataset} do not tell where documents end"
    hint = "leave it out, or use data.text or dataset_path"
    return [ConfigIssue(f"data.{key}", problem, hint) for key, is_set in needs.items() if is_set]


def vocabulary_fits(model: ModelConfig, data: DataConfig) -> list[ConfigIssue]:
    """Require an embedding row for each id of the byte tokenizer. Others are checked when they are read."""
    size = model.vocabulary
    reads_text = any(part.text is not None for part in data.parts().values())
    if not reads_text or data.tokenizer != "bytes" or size is None or size >= BYTE_VOCABULARY:
        return []
    problem = f'{size} is smaller than the "bytes" tokenizer\'s vocabulary'
    key = "model.vocab_size" if model.is_llama else "model.args.vocab_size"
    return [ConfigIssue(key, problem, f"allowed: at least {BYTE_VOCABULARY}")]


def validation_has_data(data: DataConfig, eval: EvalConfig) -> list[ConfigIssue]:
    """Require held-out text or samples for validation."""
    if eval.interval == 0 or data.val is not None or data.val_fraction > 0:
        return []
    if all(part.dataset_path is not None for part in data.parts().values()):
        return []
    problem = f"validation every {eval.interval} steps, but data.val_fraction 0 holds nothing out"
    return [
        ConfigIssue("eval.interval", problem, "set val_fraction above 0, or interval = 0 for no validation")
    ]


def schedule_fits_run(scheduler: SchedulerConfig, train: TrainConfig) -> list[ConfigIssue]:
    """Require warmup and decay to end within the run."""
    if scheduler.name == "constant" and scheduler.decay_steps is not None:
        problem = f"{scheduler.decay_steps} has no effect: the constant schedule does not decay"
        return [ConfigIssue("scheduler.decay_steps", problem, "leave it out, or choose another schedule")]
    warmup, total = scheduler.warmup_steps, train.max_steps
    if warmup > total:
        problem = f"{warmup} is more than train.max_steps {total}"
        return [ConfigIssue("scheduler.warmup_steps", problem, f"allowed: at most {total}")]
    decay = scheduler.resolved_decay_steps(total)
    if warmup + decay <= total:
        return []
    if scheduler.decay_steps is None:
        problem = f"{warmup} leaves too few of {total} steps for the decay of {decay}"
        return [ConfigIssue("scheduler.warmup_steps", problem, f"allowed: at most {total - decay}")]
    problem = f"warmup {warmup} + decay {decay} is more than train.max_steps {total}"
    return [ConfigIssue("scheduler.decay_steps", problem, f"at most {total - warmup} would fit")]


def time_limit_leaves_time(train: TrainConfig) -> list[ConfigIssue]:
    """Require time to train before the last save must start."""
    if train.max_minutes is None or 60 * train.max_minutes > train.deadline_margin_s:
        return []
    problem = (
        f"{train.max_minutes:g} minutes are not longer than deadline_margin_s, {train.deadline_margin_s:g} s"
    )
    return [ConfigIssue("train.max_minutes", problem, "raise it, or lower deadline_margin_s")]


def layout_fits(
    distributed: DistributedConfig, train: TrainConfig, world_size: int | None
) -> list[ConfigIssue]:
    """Require processes that fit the layout, and a global batch that divides over its data ranks."""
    if world_size is not None:
        return derive_geometry(distributed, train, world_size)[1]
    if distributed.dp_shard > 0:
        dp = distributed.dp_replicate * distributed.dp_shard
        return batch_faults(train, dp, "data-parallel ranks") or microbatch_faults(distributed, train, dp)
    # With dp_shard = -1 the number of ranks is known only at the start, but it is a multiple of
    # this one.
    faults = batch_faults(train, distributed.dp_replicate, "(dp_replicate)")
    if train.global_batch_size is None:
        faults += microbatch_faults(distributed, train, dp=1)
    return faults


def tensor_parallel_fits(
    distributed: DistributedConfig, model: ModelConfig, train: TrainConfig
) -> list[ConfigIssue]:
    """Require whole heads, equal shares of the rest and an embedding row on each tensor-parallel rank.

    A model of the user's is checked when it is built.
    """
    if not model.is_llama:
        return []
    tp, rows = distributed.tp, model.vocab_size
    sizes = {
        "model.n_heads": model.n_heads,
        "model.n_kv_heads": model.kv_heads,
        "model.ffn_hidden_dim": model.ffn_dim,
        "train.seq_len": train.seq_len,
    }
    faults = [
        ConfigIssue("distributed.tp", f"{tp} does not divide {name} {size}", "choose a divisor")
        for name, size in sizes.items()
        if size % tp
    ]
    if -(-rows // tp) * (tp - 1) >= rows:
        problem = f"{tp} ranks cannot each have some of model.vocab_size {rows}"
        faults.append(ConfigIssue("distributed.tp", problem, "choose a smaller one"))
    return faults


def pipeline_fits(
    distributed: DistributedConfig, model: ModelConfig, train: TrainConfig
) -> list[ConfigIssue]:
    """Require a layer per stage, microbatches that divide the batch, and no pipeline keys without one."""
    pp, schedule, micro = distributed.pp, distributed.pp_schedule, distributed.pp_microbatch_size
    faults = []
    if pp == 1:
        needs = "has no effect without a pipeline", "leave it out, or set pp > 1"
        if schedule != "1f1b":
            faults.append(ConfigIssue("distributed.pp_schedule", f'"{schedule}" {needs[0]}', needs[1]))
        if micro is not None:
            faults.append(ConfigIssue("distributed.pp_microbatch_size", f"{micro} {needs[0]}", needs[1]))
        if distributed.pp_layers is not None:
            faults.append(
                ConfigIssue("distributed.pp_layers", f"{distributed.pp_layers} {needs[0]}", needs[1])
            )
        return faults
    stages = num_stages(distributed)
    if micro is not None and train.batch_size % micro:
        problem = f"{micro} does not divide train.batch_size {train.batch_size}"
        faults.append(ConfigIssue("distributed.pp_microbatch_size", problem, "choose a divisor"))
    if not model.is_llama:
        if distributed.pp_layers is not None:
            problem = 'is for model.name "llama"; pipeline_stages() divides a model of your own'
            faults.append(ConfigIssue("distributed.pp_layers", problem, "leave it out"))
        return faults
    if model.n_layers < stages:
        problem = f"{pp} ranks under {schedule} make {stages} stages, but model.n_layers is {model.n_layers}"
        most = model.n_layers // STAGES_PER_RANK[schedule]
        faults.append(ConfigIssue("distributed.pp", problem, f"allowed: at most {max(1, most)}"))
    elif distributed.pp_layers is not None:
        faults += _pp_layers_fit(distributed.pp_layers, stages, model.n_layers)
    if model.tie_embeddings:
        problem = "the first and the last stage of a pipeline cannot share the embedding"
        faults.append(ConfigIssue("model.tie_embeddings", problem, "set tie_embeddings = false, or pp = 1"))
    return faults


def _pp_layers_fit(pp_layers: list[int], stages: int, n_layers: int) -> list[ConfigIssue]:
    if len(pp_layers) == stages and sum(pp_layers) == n_layers:
        return []
    problem = f"{pp_layers} are {len(pp_layers)} stages with {sum(pp_layers)} layers"
    return [
        ConfigIssue("distributed.pp_layers", problem, f"{stages} numbers whose sum is n_layers {n_layers}")
    ]


RULES: tuple[Callable[..., list[ConfigIssue]], ...] = (
    run_dir_expands,
    model_keys_apply,
    heads_fit,
    rope_scaling_is_ordered,
    sequence_fits_model,
    loss_arguments_fit,
    data_has_one_source,
    mixture_is_valid,
    sources_are_read,
    format_fits_data,
    documents_are_known,
    vocabulary_fits,
    validation_has_data,
    schedule_fits_run,
    time_limit_leaves_time,
    layout_fits,
    tensor_parallel_fits,
    pipeline_fits,
    *optimizer_rules.RULES,
    *checkpoint_rules.RULES,
)
