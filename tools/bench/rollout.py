"""Measures tokens per second of the built-in rollout engine, transformers.generate and a vLLM
server.

    python tools/bench/rollout.py [--vllm-python VENV/bin/python] [--prompts 8,64,256] [--tokens 64]
    python tools/bench/rollout.py --device cuda

One model of random weights (qwen3_moe: 4 layers, hidden 256, 16 experts, top-4, fp32; on CUDA 8
layers, hidden 1024, 32 experts, bf16), the same prompts of 8 to 48 tokens for all, answers of a
fixed length sampled at temperature 1. The three take turns, round by round, so that other load on
the machine affects all, odd rounds in the other order; they have equally many threads. The server
is suspended while it is not its turn, since its threads wait by computing. Without an interpreter
with vLLM (tools/setup_vllm_venv.sh makes one) vLLM is left out. --modules also measures the built-
in engine's other way, a step through Megatron's modules. --processor counts processor time, for
machines that others use too; with one thread, since threads that wait for each other count.
"""

from __future__ import annotations

import argparse
import functools
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

import httpx
import numpy as np
import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_rl.config.load import load_config  # noqa: E402
from megatron_rl.config.schema import Config  # noqa: E402
from megatron_rl.rollout.servers.process import ServerProcess  # noqa: E402

VOCABULARY, LONGEST_PROMPT = 512, 48
SHAPES = {
    "cpu": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "head_dim": 32,
        "num_experts": 16,
        "moe_intermediate_size": 128,
    },
    "cuda": {
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "head_dim": 64,
        "num_experts": 32,
        "moe_intermediate_size": 512,
    },
}
DTYPES = {"cpu": ("fp32", torch.float32), "cuda": ("bf16", torch.bfloat16)}
ROW = "{:>5} prompts  {:24} {:>26}   built-in / it: {}"
Round = Callable[[], int]  # generates once; the tokens it made
Engine = Callable[[list[np.ndarray]], Round]


def main() -> int:
    """Build the model, take turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prompts", type=_counts, default=[64], help="8,64: measured one by one")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor", action="store_true", help="per second of processor time")
    parser.add_argument("--modules", action="store_true", help="also through Megatron's modules")
    parser.add_argument("--vllm-python", help="interpreter of an environment with vLLM")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = np.random.default_rng(3)
    prompts = [
        generator.integers(2, VOCABULARY, int(generator.integers(8, LONGEST_PROMPT + 1)))
        for _ in range(max(arguments.prompts))
    ]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        _save_model(directory, SHAPES[arguments.device], LONGEST_PROMPT + arguments.tokens)
        built = _built(directory, arguments)
        engines = {"built-in engine": _builtin(*built, arguments, modules=False)}
        if arguments.modules:
            engines["built-in, modules"] = _builtin(*built, arguments, modules=True)
        engines["transformers.generate"] = _transformers(directory, arguments)
        server = ServerProcess("127.0.0.1", Path(folder) / "vllm.log")
        try:
            if arguments.vllm_python:
                engines["vLLM server"] = _vllm(server, directory, arguments)
            print(
                f"answers of {arguments.tokens} tokens, {DTYPES[arguments.device][0]} on "
                f"{arguments.device}, {arguments.threads} threads; tokens/s"
                f"{' of processor time' if arguments.processor else ''}, median (range) of "
                f"{arguments.rounds} rounds in turns"
            )
            clock = functools.partial(_processor_s, server)
            for count in arguments.prompts:
                rounds = {name: engine(prompts[:count]) for name, engine in engines.items()}
                now = clock if arguments.processor else time.perf_counter
                _show(count, _take_turns(rounds, arguments.rounds, now))
        finally:
            _signal(server, signal.SIGCONT)
            server.stop()
    return 0


def _counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _show(count: int, speeds: dict[str, list[float]]) -> None:
    ours = np.median(speeds["built-in engine"])
    for name, values in speeds.items():
        text = f"{np.median(values):,.0f} ({min(values):,.0f} .. {max(values):,.0f})"
        print(ROW.format(count, name, text, f"{ours / np.median(values):.2f}"), flush=True)


def _processor_s(server: ServerProcess) -> float:
    """Seconds of processor time of this process and of the server's processes."""
    used = time.process_time()
    if server.pid is not None:
        process = psutil.Process(server.pid)
        for one in (process, *process.children(recursive=True)):
            times = one.cpu_times()
            used += times.user + times.system
    return used


def _signal(server: ServerProcess, number: int) -> None:
    """Send a signal to the server's processes, if it runs."""
    if server.pid is not None:
        process = psutil.Process(server.pid)
        for one in (process, *process.children(recursive=True)):
            one.send_signal(number)


def _take_turns(
    rounds: dict[str, Round], count: int, now: Callable[[], float]
) -> dict[str, list[float]]:
    speeds: dict[str, list[float]] = {name: [] for name in rounds}
    for number in range(count + 1):
        turns = list(rounds.items())
        for name, generate in turns if number % 2 else turns[::-1]:
            began = now()
            made = generate()
            if number:  # the first is not counted
                speeds[name].append(made / (now() - began))
    return speeds


def _save_model(directory: Path, shape: dict[str, int], longest: int) -> None:
    import transformers

    config = transformers.Qwen3MoeConfig(
        **shape,
        vocab_size=VOCABULARY,
        num_key_value_heads=4,
        intermediate_size=512,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=longest,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).float().save_pretrained(directory)


def _config(directory: Path, arguments: argparse.Namespace, **more: str) -> Config:
    words = {"model.hf_path": directory, "device.kind": arguments.device, **more}
    words["model.dtype"], _ = DTYPES[arguments.device]
    words["device.threads"] = arguments.threads
    return load_config(None, [f"--{name}={value}" for name, value in words.items()])


def _built(directory: Path, arguments: argparse.Namespace) -> tuple[Any, ...]:
    """Configuration, groups, Megatron's configuration and chunks of the model."""
    from megatron_rl.device.launch import read_launch
    from megatron_rl.device.select import connect, select_device

    config = _config(directory, arguments)
    launch = read_launch()
    device = select_device(config.device, launch)
    connect(device, launch, config.device.timeout_s)

    from megatron_rl.models.build import build_chunks, transformer_config
    from megatron_rl.parallel.groups import build_groups
    from megatron_rl.policy.initial_weights import load_initial_weights

    groups = build_groups(config.parallel)
    transformer = transformer_config(config.model, config.parallel, device)
    chunks = build_chunks(config.model, transformer, groups, device, config.seed)
    load_initial_weights(config, chunks, groups)
    return config, groups, transformer, chunks


def _builtin(
    config: Config,
    groups: Any,
    transformer: Any,
    chunks: list,
    arguments: argparse.Namespace,
    *,
    modules: bool,
) -> Engine:
    from megatron_rl.records import Prompt
    from megatron_rl.rollout.builtin.generate import BuiltinEngine
    from megatron_rl.rollout.builtin.plain.plan import Plan
    from megatron_rl.rollout.engine import SamplingSettings

    engine = BuiltinEngine(
        chunks=chunks,
        groups=groups,
        transformer_config=transformer,
        stop_ids=(),  # no token ends an answer
        max_batch=max(arguments.prompts),
        decode=lambda ids: "",
        max_sequence_length=config.model.max_sequence_length,
        plan=Plan("they are measured") if modules else None,
    )
    settings = SamplingSettings(samples=1, max_new_tokens=arguments.tokens, seed=1)

    def of(prompts: list[np.ndarray]) -> Round:
        records = [Prompt(i, ids, "", {}) for i, ids in enumerate(prompts)]

        def generate() -> int:
            groups = engine.generate(records, settings)
            return sum(len(group.completions[0].tokens) for group in groups)

        return generate

    return of


def _transformers(directory: Path, arguments: argparse.Namespace) -> Engine:
    import transformers

    _, dtype = DTYPES[arguments.device]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, trust_remote_code=False
    )
    model = model.to(arguments.device).eval()
    settings = transformers.GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=arguments.tokens,
        min_new_tokens=arguments.tokens,
        pad_token_id=0,
    )

    def of(prompts: list[np.ndarray]) -> Round:
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded on the left
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, mask = ids.to(arguments.device), mask.to(arguments.device)

        @torch.no_grad()
        def generate() -> int:
            out = model.generate(ids, attention_mask=mask, generation_config=settings)
            return (out.shape[1] - width) * len(prompts)

        return generate

    return of


def _vllm(server: ServerProcess, directory: Path, arguments: argparse.Namespace) -> Engine:
    from megatron_rl.rollout.servers.vllm_command import vllm_command

    config = _config(directory, arguments, **{"rollout.servers.python": arguments.vllm_python})
    on_cpu = arguments.device == "cpu"
    server.start(*vllm_command(config, on_cpu, directory, "127.0.0.1", server.port))
    server.wait_until_ready(180.0)
    _signal(server, signal.SIGSTOP)

    def of(prompts: list[np.ndarray]) -> Round:
        body = {
            "model": "policy",
            "prompt": [prompt.tolist() for prompt in prompts],
            "max_tokens": arguments.tokens,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "detokenize": False,
        }

        def generate() -> int:
            url = f"{server.url}/v1/completions"
            headers = {"Authorization": f"Bearer {server.key}"}
            _signal(server, signal.SIGCONT)
            response = httpx.post(url, json=body, headers=headers, timeout=600.0, trust_env=False)
            _signal(server, signal.SIGSTOP)
            choices = response.raise_for_status().json()["choices"]
            return sum(len(choice["token_ids"]) for choice in choices)

        return generate

    return of


if __name__ == "__main__":
    sys.exit(main())
