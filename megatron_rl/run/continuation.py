"""Checks whether a run can resume from a checkpoint with its present configuration, and what
differs.

It reads only small files: `check_continuation` runs before the ranks join, and every rank finds a
mistake by itself.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Mapping, Sequence

from megatron_rl.checkpoint.directory import find_checkpoint, newest_checkpoint
from megatron_rl.checkpoint.identity import architecture_of, check_architecture
from megatron_rl.checkpoint.manifest import MANIFEST, Damaged, read_manifest, read_state
from megatron_rl.config.data import data_text
from megatron_rl.config.on_resume import Change, kind_of, shown
from megatron_rl.config.own_code import own_code
from megatron_rl.config.schema import Config
from megatron_rl.data.identity import difference, identity_of
from megatron_rl.data.prompts import DataPart
from megatron_rl.errors import UserError
from megatron_rl.observe.configurations import changes_since
from megatron_rl.records import Prompt, Sample

#: Bytes from the beginning of a weight file that identify it: its index and first tensors.
_READ = 1 << 22


def run_identity(
    config: Config,
    verb: str,
    train: Sequence[Prompt | Sample],
    held_out: Sequence[Prompt],
    parts: Sequence[DataPart] = (),
) -> dict[str, Any]:
    """The identity of a run, which its checkpoints keep: the verb, hashes of the data and of a
    user's own code, and the source of the reference policy. Fit for JSON. ``parts``: of a mixture.
    """
    identity = {
        "verb": verb,
        "train": identity_of(train, parts),
        "eval": identity_of(held_out),
        "code": own_code(config, verb),
    }
    if verb == "train" and config.algorithm.reference == "initial":
        identity["reference"] = _initial_weights(config)
    return identity


def check_continuation(config: Config, identity: Mapping[str, Any]) -> None:
    """Refuse a configuration that cannot resume from the newest checkpoint in ``config.run_dir``.
    `checkpoints.load_newest` handles damaged checkpoints.

    Raises:
        UserError: architecture, seed, order, verb, problems or reference differ; it names the key,
            both values and the remedy.
    """
    path = newest_checkpoint(config.run_dir / "checkpoints")
    if path is None or config.checkpoint.resume == "never":
        return
    try:
        manifest = read_manifest(path)
        state = read_state(path)
    except Damaged:
        return
    check_architecture(manifest.architecture, architecture_of(config.model), str(path))
    check_state(config, path, state, identity)


def check_state(
    config: Config, path: Path, state: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
    """As `check_continuation`, for the state of one checkpoint whose architecture matches.

    Args:
        path: the checkpoint.
        state: as given to `save_checkpoint`; {} if the checkpoint holds weights only.
        identity: of the run that wants to continue, `run_identity`.
    """
    if not state:
        return
    anew = f"start a new run from these weights: another run_dir, checkpoint.init_from {path}"
    stored = state.get("identity") or {"verb": _verb_of(state["task"])}
    if stored["verb"] != identity["verb"]:
        raise UserError(
            f"{path} is of a run of {stored['verb']}; expected one of {identity['verb']}; use the "
            f"verb {stored['verb']}, or {anew}"
        )
    for change in changes_since(config.run_dir, state["step"], config) or ():
        if _is_refused(change):
            raise UserError(
                f"{change.key} was {shown(change.before)} in the run that wrote {path} and is "
                f"{shown(change.after)} now; expected the same; restore it, or {anew}"
            )
    _check_data(config, path, stored, identity, anew)
    before, now = stored.get("reference"), identity.get("reference")
    if before and now and before["sha256"] != now["sha256"]:
        raise UserError(
            f"algorithm.reference initial would be {now['of']} and was {before['of']} in the run "
            f"that wrote {path}; expected the same weights; name them with checkpoint.init_from or "
            f"model.hf_path, or {anew}"
        )


def _check_data(
    config: Config, path: Path, stored: Mapping[str, Any], identity: Mapping[str, Any], anew: str
) -> None:
    other = difference(stored["train"], identity["train"]) if "train" in stored else None
    if other is not None and config.checkpoint.changed_data == "refuse":
        raise UserError(
            f"data.train {data_text(config.data.train)} does not give what {path} was trained on "
            f"({other}); expected the same; restore file, tokenizer and keys, or go on with these "
            f"with --checkpoint.changed_data accept, or {anew}"
        )


def what_differs(
    config: Config, state: Mapping[str, Any], identity: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Lists what has changed since a checkpoint was written: lines to note, and lines to warn
    with.
    """
    step = state["step"]
    changed = changes_since(config.run_dir, step, config)
    stored, notes, warnings = state.get("identity"), [], []
    if changed:
        notes.append(f"changed since step {step}:")
        notes += [f"  {change}" for change in changed]
    if changed is None:
        warnings.append(f"{config.run_dir} holds no config.yaml: what has changed is not known")
    if stored is None:
        warnings.append(
            "the checkpoint is of a version that did not keep what its problems were: whether "
            "data.train and data.eval still give the same is not known"
        )
        return notes, warnings
    for name, digest in identity["code"].items():
        if stored.get("code", {}).get(name, digest) != digest:
            warnings.append(f"the file of {name} has changed: going on with it as it is now")
    for split, meaning in (
        ("train", "going on with these"),
        ("eval", "evaluations before and after cannot be compared"),
    ):
        other = difference(stored[split], identity[split])
        if other is not None:
            path = data_text(getattr(config.data, split))
            warnings.append(f"data.{split} {path} has changed ({other}): {meaning}")
    return notes, warnings


def _is_refused(change: Change) -> bool:
    if change.key == "model.freeze_router":  # frozen weights have no optimizer state to restore
        return change.after is False
    # `check_architecture` compares the section model.
    return kind_of(change.key) == "refused" and not change.key.startswith("model.")


def _verb_of(task: Mapping[str, Any]) -> str:
    """The verb of a checkpoint that does not store it."""
    return "sft" if "samples" in task else "train"


def _initial_weights(config: Config) -> dict[str, str]:
    """The source of a run's initial weights, and a SHA-256 that identifies them."""
    digest, model = hashlib.sha256(), config.model
    if config.checkpoint.init_from is not None:
        path = find_checkpoint(config.checkpoint.init_from)
        digest.update(
            (path / MANIFEST).read_bytes()
        )  # the manifest holds the checksum of every file
        return {"of": str(path), "sha256": digest.hexdigest()}
    if model.hf_path is None:
        name = f"random weights of seed {config.seed} with model.init_std {model.init_std}"
        return {"of": name, "sha256": hashlib.sha256(name.encode()).hexdigest()}
    for path in sorted(model.hf_path.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(_READ))
    return {"of": str(model.hf_path), "sha256": digest.hexdigest()}
