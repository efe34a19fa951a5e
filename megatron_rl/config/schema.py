"""The configuration: one typed tree, a docstring with unit for every field.

Unknown keys are refused; ``load.py`` validates strictly (1.0 is no integer, "3" is no number);
rules that span several fields live in ``checks.py``. Nothing here imports torch or Megatron.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_rl.config.schema_data import DataConfig
from megatron_rl.config.schema_observe import ObserveConfig
from megatron_rl.config.schema_reward import RewardConfig
from megatron_rl.config.schema_rollout import RolloutConfig
from megatron_rl.config.section import Section


class YarnConfig(Section):
    """YaRN (arXiv 2309.00071): rotary embeddings stretched to sequences longer than those of
    pre-training. Latent attention only.
    """

    factor: float = Field(ge=1.0)
    """Longest sequence, as a multiple of that of pre-training."""
    original_max_position_embeddings: int = Field(ge=1)
    """Longest sequence of pre-training, tokens."""
    beta_fast: float = Field(32.0, gt=0.0)
    """A channel with more turns than this within that length keeps its frequency."""
    beta_slow: float = Field(1.0, gt=0.0)
    """A channel with fewer turns than this has its frequency divided by factor."""
    mscale: float = Field(1.0, gt=0.0)
    """With mscale_all_dim: factor on sines and cosines."""
    mscale_all_dim: float = Field(1.0, gt=0.0)
    """Scales attention scores by (0.1 mscale_all_dim ln(factor) + 1)^2."""


class ModelConfig(Section):
    """The architecture: a preset or a Hugging Face model, with any field overridden."""

    preset: str | None = None
    """A name of ``config/presets.py``; gives the fields below their values."""
    hf_path: Path | None = None
    """A Hugging Face model directory: its config.json gives the fields below their values, its
    weights start a new run, its tokenizer is used where data.tokenizer.path is null."""
    hf_config: Path | None = None
    """A Hugging Face config.json (or its directory): gives the architecture only."""
    family: str | None = None
    """How config.json and tensors are read and written: a Hugging Face family by name, or your own,
    ./my_family.py:FAMILY; null: the one of config.json's model_type."""
    num_layers: int = Field(4, ge=1, le=10_000)
    """Transformer layers, over all pipeline stages."""
    hidden_size: int = Field(128, ge=1)
    """Width D of the residual stream."""
    num_attention_heads: int = Field(4, ge=1)
    """Query heads."""
    num_query_groups: int | None = Field(None, ge=1)
    """Key/value heads (grouped-query attention); null: as many as query heads."""
    head_dim: int | None = Field(None, ge=1)
    """Width of a head; null: hidden_size / num_attention_heads."""
    ffn_hidden_size: int = Field(256, ge=1)
    """Inner width of the SwiGLU MLP of dense layers."""
    num_experts: int = Field(8, ge=0)
    """Experts E of a MoE layer; 0: a dense model, all of whose layers are MLPs."""
    moe_top_k: int = Field(2, ge=1)
    """Experts K a token is sent to."""
    moe_ffn_hidden_size: int = Field(128, ge=1)
    """Inner width of an expert."""
    moe_layer_freq: Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=0, le=1)]] = 1
    """n: every n-th layer is MoE (0, n, 2n...); a list of num_layers zeros and ones: 1 is MoE."""
    shared_expert_ffn_hidden_size: int | None = Field(None, ge=1)
    """Inner width of the shared expert (all shared experts together); null: no shared expert."""
    shared_expert_gate: bool = False
    """Sigmoid gate on the shared expert's output (Qwen2-MoE)."""
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    """Score function of the router."""
    router_pre_softmax: bool = False
    """True: softmax over all experts, then top-K (the weights do not sum to one).

    False: top-K first, then softmax over the K. Softmax routers only."""
    router_expert_bias: bool = False
    """Add a bias per expert to the scores that choose the top-K (DeepSeek-V3), not to weights."""
    router_num_groups: int | None = Field(None, ge=1)
    """Expert groups of group-limited routing; null: no groups."""
    router_group_top_k: int | None = Field(None, ge=1)
    """Groups a token may choose from."""
    router_scaling_factor: float | None = None
    """Factor on the top-K weights (DeepSeek-V3: 2.5)."""
    aux_loss_coeff: float = Field(0.0, ge=0.0)
    """Load-balancing loss; 0: off, the default, because under RL it fights the reward."""
    z_loss_coeff: float = Field(0.0, ge=0.0)
    """Router z-loss; 0: off."""
    expert_bias_update_rate: float = Field(0.0, ge=0.0)
    """Step of the auxiliary-loss-free balancing update of the expert bias; 0: frozen."""
    freeze_router: bool = False
    """True: router weights are not trained."""
    vocab_size: int = Field(128, ge=2)
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    max_sequence_length: int = Field(256, ge=2)
    """Longest sequence (prompt and answer), tokens."""
    rope_base: float = Field(10000.0, gt=0.0)
    """Base of the rotary position embedding."""
    yarn: YarnConfig | None = None
    """Stretching of the rotary position embedding; null: none."""
    qk_norm: bool = True
    """RMSNorm on queries and keys."""
    qk_norm_scope: Literal["head", "layer"] = "head"
    """head: each head is normalised by itself (Qwen3); layer: all heads together (OLMoE)."""
    kv_lora_rank: int | None = Field(None, ge=1)
    """Width of the compressed keys and values of multi-head latent attention (DeepSeek); null:
    grouped-query attention. It needs the three head widths below, excludes head_dim and
    num_query_groups, and makes qk_norm the norm of the compressed vectors."""
    q_lora_rank: int | None = Field(None, ge=1)
    """Width of the compressed queries of latent attention; null: queries are not compressed."""
    qk_nope_head_dim: int | None = Field(None, ge=1)
    """Latent attention: width of the part of a query or key head without position."""
    qk_rope_head_dim: int | None = Field(None, ge=2)
    """Latent attention: width of the rotated part, which all key heads share."""
    v_head_dim: int | None = Field(None, ge=1)
    """Latent attention: width of a value head."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    norm_epsilon: float = Field(1e-6, gt=0.0)
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """Input embedding and output layer share their weight."""
    init_std: float = Field(0.02, gt=0.0)
    """Standard deviation of the initial weights."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and activations.

    Routers, log-probabilities, main weights and gradients are always fp32.
    """
    fp32_head: bool = False
    """Multiply hidden states and output layer in fp32: with dtype bf16 logits are not rounded, in
    scoring, update and the built-in engine. Servers have their own settings."""
    transformer_engine: bool | None = None
    """Use Transformer Engine layers; null: yes on CUDA where it is installed."""


class ParallelConfig(Section):
    """The parallel layout. Ranks = data-parallel size x tensor x pipeline x context."""

    tensor: int = Field(1, ge=1)
    """Tensor parallel size; above 1 sequence parallelism is on as well."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages."""
    virtual_pipeline: int | None = Field(None, ge=2)
    """Model chunks per pipeline stage (interleaved schedule); null: one."""
    context: int = Field(1, ge=1)
    """Context parallel size: ranks over which the tokens of every sequence are spread; above 1
    sequences in packs are padded to multiples of twice that."""
    expert: int = Field(1, ge=1)
    """Expert parallel size."""
    expert_tensor: int = Field(1, ge=1)
    """Tensor parallel size inside an expert."""
    world_size: int | None = Field(None, ge=1)
    """Ranks the run is meant for, compared with those launched; null: any number that fits."""
    dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """Megatron's token dispatcher; flex needs CUDA and DeepEP."""
    expert_exchange: Literal["auto", "tokens", "weights"] = "auto"
    """What travels between expert-parallel ranks in scoring and update.

    tokens: each token to the ranks of its experts and back, in every layer. weights: those of all
    experts to every rank, once a mini-batch, and their gradients back; needs memory for them. auto:
    on a CPU weights, where a mini-batch is large enough and they fit; on CUDA tokens."""
    distributed_optimizer: bool = False
    """Shard the optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs. On a CPU the ranks of one machine sum them in
    shared memory faster than that; it can gain where they are on several."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: none, attention only, or whole layers."""


class DeviceConfig(Section):
    """The device, and the ranks' timeouts."""

    kind: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of a rank; null: cores that the process may use / ranks on the machine, whatever
    OMP_NUM_THREADS says (torchrun sets it to 1 by itself)."""
    timeout_s: float = Field(600.0, gt=0)
    """A collective that takes longer ends the run, seconds."""
    silence_s: float = Field(45.0, ge=1.0)
    """A rank without a sign of life for this long is named on stderr, seconds; the run goes on."""
    heartbeat_file: Path | None = None
    """A file for a liveness probe: the first rank of each machine touches it every few seconds
    while no rank of that machine is silent; null: none."""


class RouterShiftConfig(Section):
    """Router shift (arXiv 2510.23027 v2, eq. 5-9)."""

    enabled: bool | None = None
    """null: as the loss asks (rspo, rspo_v1: yes; others: no)."""
    floor: float = Field(0.8, ge=0.0, le=1.0)
    """gamma_min: lowest weight of a token's ratio."""
    mode: Literal["ratio", "negative_only", "range", "token_weight"] = "ratio"
    """Where gamma enters; ratio: the paper.

    ratio: on the ratio, before clip and mean (rspo_v1: after the clip). negative_only: the same
    where the advantage is negative. range: on the clip range, not on the ratio. token_weight: as
    the weight of a token in the geometric mean of gspo, gmpo and rspo."""
    normalise: Literal["none", "batch_mean"] = "none"
    """batch_mean: divide gamma by its mean over the mini-batch; costs one more forward pass."""
    distance: Literal["top_k", "gate_weighted", "union"] = "top_k"
    """Which experts count in a layer's distance; top_k: the paper.

    top_k: those that the old policy chose, alike. gate_weighted: the same, as much as the old
    router's scores. union: those that the old or the new policy chose; the trace then holds all
    experts' log-probabilities."""
    experts: int | None = Field(None, ge=1)
    """distance top_k: how many of the experts count, those that the old router scored highest;
    null: all K."""
    layers: Literal["mean", "max", "quantile", "last"] = "mean"
    """How the distances of the MoE layers are reduced to one; mean: the paper."""
    quantile: float = Field(0.9, gt=0.0, le=1.0)
    """layers quantile: the quantile of the layers' distances, 0 to 1; 1: the maximum."""
    stop_gradient: bool = True
    """false: the gradient goes through gamma as well, into the routers. An ablation: the paper
    reports that training collapses. Not with pipeline stages or full recomputation."""
    penalty: float = Field(0.0, ge=0.0)
    """Coefficient of the routers' distance from the old policy, nats, a mean over trained tokens
    beside the loss; its gradient goes into the routers. With floor 1 it is all that is left of
    router shift. Over pipeline stages and with full recomputation only with layers mean. Not in
    the paper."""


class AlgorithmConfig(Section):
    """The policy loss and its inputs."""

    name: str = "rspo"
    """The loss: a name of `megatron-rl list losses`, or one of your own, ./my_loss.py:my_loss."""
    settings: dict[str, Any] = {}
    """Settings of the loss that differ from its defaults, such as clip ranges."""
    advantages: str = "group_norm"
    """The advantage estimator: a name of `megatron-rl list advantages`, or one of your own."""
    advantages_settings: dict[str, Any] = {}
    """Settings of the advantage estimator that differ from its defaults."""
    router_shift: RouterShiftConfig = RouterShiftConfig()
    """The per-token weight against drifting routers."""
    routing_replay: Literal["none", "r2", "r3"] = "none"
    """r2: the update uses the experts that the scoring pass chose for each token; r3: scoring pass
    and update use the experts that the sampler chose. The routers still learn, through the weights
    they give."""
    trace_store: Literal["device", "pinned"] = "device"
    """Where the router trace is kept until the update; pinned: host memory (the same on a CPU)."""
    mismatch: str = "none"
    """Weight on the loss that corrects the mismatch of sampler and scoring pass, from pi_old / mu:
    none, a name of `megatron-rl list corrections`, or one of your own."""
    mismatch_settings: dict[str, Any] = {}
    """Settings of that correction that differ from its defaults."""
    mismatch_low: float = Field(0.5, ge=0.0)
    """icepop: lowest pi_old / mu that is kept."""
    mismatch_high: float | None = Field(None, gt=0.0)
    """tis, mis: the cap C; icepop: highest pi_old / mu that is kept; null: 2, for icepop 5."""
    kl_coef: float = Field(0.0, ge=0.0)
    """Coefficient of the KL penalty towards the reference, a mean over tokens; 0: off."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that penalty (``algorithms/kl.py``)."""
    reference: Literal["none", "initial"] = "none"
    """initial: keep the weights the run starts from in host memory and score them in every step."""
    entropy_coef: float = Field(0.0, ge=0.0)
    """Coefficient of the entropy bonus, a mean over tokens; 0: off."""
    mini_batches: int = Field(4, ge=1)
    """Optimizer steps a rollout batch is split into."""
    epochs: int = Field(1, ge=1)
    """Passes over a rollout batch."""


class OptimizerConfig(Section):
    """The optimizer and its learning rate."""

    name: str = "adam"
    """The optimizer: a name of `megatron-rl list optimizers`, or one of your own, ./my.py:thing."""
    settings: dict[str, Any] = {}
    """Settings of the optimizer that differ from its defaults."""
    lr: float = Field(3e-4, gt=0.0)
    """Peak learning rate. If it is not given and the run starts from trained weights
    (model.hf_path, checkpoint.init_from): 1e-6 for train, 1e-5 for sft."""
    min_lr: float = Field(0.0, ge=0.0)
    """Learning rate at the end of the decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay after warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Decoupled weight decay; not on biases and norms."""
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """For optimizers with this setting (adam, muon): decay of the mean of the gradients."""
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    """For the same optimizers: decay of the mean of their squares, per step."""
    epsilon: float = Field(1e-8, gt=0.0)
    """For the same optimizers: added to the root of the mean square before dividing."""
    clip_grad: float = Field(1.0, ge=0.0)
    """Clip the global gradient norm to this; 0: off."""


class TrainConfig(Section):
    """Length of the run."""

    steps: int = Field(100, ge=1)
    """train: rollout batches; sft: optimizer steps."""
    batch_size: int = Field(256, ge=1)
    """sft only: sequences of an optimizer step, over all ranks."""


class EvaluateConfig(Section):
    """Evaluation on ``data.eval``."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only before the first and after the last step."""
    problems: int | None = Field(None, ge=1)
    """Use the first n problems; of several data sets, equally many of each; null: all."""
    samples: int = Field(4, ge=0)
    """Sampled answers k a problem for mean@k, at rollout.temperature; 0: only greedy pass@1."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: int = Field(10, ge=0)
    """Steps between checkpoints; 0: only at the end and when asked to stop."""
    asynchronous: bool = False
    """Write in the background, from a copy in host memory of what a rank stores."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    keep_best: int = Field(0, ge=0)
    """Best checkpoints kept in addition, among the evaluated steps."""
    best_metric: str = Field("eval/pass@1", pattern=r"^eval/(pass@1|mean@k|[a-z][a-z0-9_]*)$")
    """The metric that ranks them, highest first: eval/pass@1, eval/mean@k, or eval/ and the name of
    a part of the reward."""
    init_from: Path | None = None
    """Run or checkpoint directory whose weights (and nothing else) a new run starts from; null: the
    weights of model.hf_path, else random ones."""
    resume: Literal["auto", "newest", "never"] = "auto"
    """auto: continue from the run's newest undamaged checkpoint, if any; newest: continue from the
    newest, and refuse if it is damaged; never: start anew and move the old checkpoints aside."""
    changed_data: Literal["refuse", "accept"] = "refuse"
    """What to do if data.train gives other problems than the run was trained on. accept: go on with
    them, at the same place if there are equally many, else with a new epoch."""


class Config(Section):
    """The whole configuration of a run."""

    run_dir: Path = Path("runs/default")
    """The run's directory: config.yaml, metrics.jsonl, samples.jsonl, checkpoints/, report.html."""
    seed: int = Field(1, ge=0, lt=2**32)
    """Seed of everything random: weights, order of problems, sampling."""
    model: ModelConfig = ModelConfig()
    """The architecture."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model is split over ranks."""
    device: DeviceConfig = DeviceConfig()
    """The device, and the ranks' timeouts."""
    data: DataConfig = DataConfig()
    """Tokenizer, problems and packing."""
    reward: RewardConfig = RewardConfig()
    """The verifier."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling of answers."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """The policy loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer and its learning rate."""
    train: TrainConfig = TrainConfig()
    """Length of the run."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation on held-out problems."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    observe: ObserveConfig = ObserveConfig()
    """What is shown and written."""
