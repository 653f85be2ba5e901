"""What a training step takes: memory of one GPU and floating-point operations, from sizes alone.

Pure arithmetic on the numbers of an architecture (`Sizes`), of the largest micro-batch (`Batch`) and of how both are
kept (`Setup`); nothing here reads a model, a config or a file. Counts are elements unless a name says bytes.

Sources: weights, gradients and optimizer states under ZeRO as in Rajbhandari et al. 2020 (https://arxiv.org/abs/
1910.02054, section 3), with the buckets of DeepSpeed's config. Activations are counted tensor by tensor as Korthikanti
et al. 2022 do for GPT (https://arxiv.org/abs/2205.05198, section 4), here for what transformers' layers keep for the
backward pass: RMSNorm computes in float32, feed-forward layers are gated, SDPA keeps no attention matrix. Operations
are 2 per weight and token forward and 4 backward (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, section 2.1),
4 per layer, query width and visible key for attention.
"""

from dataclasses import dataclass, field, fields
from typing import Literal

HEAD_TILE = 32_768  # tokens of the vocabulary that TRL's fused head computes at a time, however many there are
HEAD_ROWS = 4096  # positions that it takes at a time (trl.kernels.chunked_logprob)
CUDA_BYTES = 3 * 2**29  # assumed, not measured: context, cuBLAS workspaces and NCCL's channels
FRAGMENTATION = 0.05  # assumed: of what tensors take, that PyTorch's allocator cannot hand out again


@dataclass(frozen=True)
class Stack:
    """The layers of a language model or of a vision tower.

    Attributes:
        layers: How many.
        width: Of the stream that they read and write.
        inner: Of their feed-forward part.
        queries: Width of all query heads together.
        keys: Width of all key heads together; fewer than `queries` with grouped queries.
        heads: Query heads.
        weights: Parameters of all layers.
        wide: Tensors of width `inner` that one feed-forward part keeps: 4 when it is gated, else 2 or 3.
        norms: Of each layer, of its width.
        rms: RMSNorm, which computes in float32, instead of LayerNorm.
        scaled: The outputs of attention and feed-forward are multiplied by learned scales.
        normed_heads: Queries and keys are normalized.
    """

    layers: int
    width: int
    inner: int
    queries: int
    keys: int
    heads: int
    weights: int
    wide: int = 4
    norms: int = 2
    rms: bool = True
    scaled: bool = False
    normed_heads: bool = False


@dataclass(frozen=True)
class Flow:
    """How gradients meet a stack.

    Attributes:
        passes: They pass through it, to something that is trained in it or before it.
        trained: Its own weights are trained.
        ranks: Sum of the ranks of the LoRA adapters of one layer.
    """

    passes: bool = True
    trained: bool = True
    ranks: int = 0


@dataclass(frozen=True)
class Sizes:
    """An architecture with its trained parts.

    Attributes:
        text: The language model's layers.
        vision: The tower's.
        vocabulary: Tokens that the head scores.
        total: Parameters, adapters included; what is tied counts once.
        trained: Those that are trained.
        projector: Parameters between tower and language model.
        merge: Tower tokens that become one token of the language model, 4 for InternVL and Qwen-VL.
        patch: Numbers in one patch of a picture.
        quantized: Parameters that `load_in_4bit` or `load_in_8bit` stores smaller.
        head_trained: The head's weights are trained.
        text_flow: How gradients meet the language model.
        vision_flow: How they meet the tower.
    """

    text: Stack
    vision: Stack | None
    vocabulary: int
    total: int
    trained: int
    projector: int = 0
    merge: float = 1.0
    patch: int = 588
    quantized: int = 0
    head_trained: bool = True
    text_flow: Flow = field(default_factory=Flow)
    vision_flow: Flow = field(default_factory=Flow)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one GPU, as the model gets it.

    Attributes:
        rows: Of text.
        length: Tokens of each row, padding included.
        scored: Tokens whose log-probability is asked for.
        patches: Tokens of the tower, all pictures together.
    """

    rows: int
    length: int
    scored: int
    patches: int = 0

    @property
    def tokens(self) -> int:
        """All tokens of the language model."""
        return self.rows * self.length


@dataclass(frozen=True)
class Setup:
    """How numbers are kept, on how many GPUs.

    Attributes:
        gpus: In all.
        stage: ZeRO's: 0 keeps everything everywhere, 1 shards optimizer states, 2 gradients too, 3 weights too.
        offload_optimizer: Optimizer states and float32 weights stay in the CPU's memory.
        offload_weights: So do the sharded weights of stage 3.
        weight_bytes: Of one weight of the policy and of the reference.
        trained_bytes: Of one trained weight and its gradient: 4 for adapters beside a model in bfloat16.
        stream_bytes: Of one number between layers: 4 under autocast.
        compute_bytes: Of one number that goes into a matrix product.
        master: DeepSpeed keeps float32 copies of the trained weights.
        state_bytes: Of the optimizer's states of one trained weight: 8 for AdamW in float32.
        quantized_bytes: Of one quantized weight.
        checkpointing: Layers keep only their input and are computed again in the backward pass.
        reference: A second model is kept.
        attention: `sdpa` keeps a mask for every layer, `eager` its whole matrix.
        buckets: Numbers in the buckets that DeepSpeed exchanges and gathers.
        gathered: Weights that stage 3 may hold whole at a time.
        accelerator: Whether there is a GPU, with what its driver and allocator take.
    """

    gpus: int = 1
    stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: bool = False
    offload_weights: bool = False
    weight_bytes: float = 4
    trained_bytes: float = 4
    stream_bytes: float = 4
    compute_bytes: float = 4
    master: bool = False
    state_bytes: float = 8
    quantized_bytes: float = 0
    checkpointing: bool = True
    reference: bool = True
    attention: str = "sdpa"
    buckets: int = 0
    gathered: int = 0
    accelerator: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the fullest moment of a step.

    Attributes:
        weights: Of the policy, in what is computed with.
        gradients: Of the trained weights.
        optimizer: AdamW's moments, and float32 weights where DeepSpeed keeps them.
        reference: Weights of the second model.
        activations: What the backward pass of a micro-batch needs.
        working: What the head, or the layer that is computed just now, holds for a moment.
        buffers: Buckets that GPUs exchange, and weights gathered by ZeRO-3.
        overhead: Driver, libraries and fragmentation.
        cpu: In the memory of the host, for each GPU; not part of `total`.
    """

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    working: int
    buffers: int
    overhead: int
    cpu: int = 0

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(getattr(self, part.name) for part in fields(self)) - self.cpu

    @property
    def states(self) -> int:
        """What is there whatever the batch: weights, gradients, optimizer, reference, buffers."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.buffers


@dataclass(frozen=True)
class Work:
    """What one pass over some rows makes a model compute.

    Attributes:
        tokens: Of the language model, without padding.
        visible: Sum over tokens of the tokens that each one sees.
        scored: Tokens that the head scores.
        patches: Of the tower.
        patches_visible: Sum over patches of those that each one sees.
    """

    tokens: int
    visible: int
    scored: int
    patches: int = 0
    patches_visible: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def times(self, factor: float) -> "Work":
        """So many times the same."""
        return Work(*(round(getattr(self, part.name) * factor) for part in fields(self)))


def estimate_memory(sizes: Sizes, batch: Batch, setup: Setup) -> Memory:
    """The fullest moment of a step, with the gradients of earlier micro-batches in place.

    Args:
        sizes: Of the model.
        batch: The largest micro-batch.
        setup: How numbers are kept.
    """
    whole = sizes.total - sizes.trained
    weights = _weight_bytes(sizes, setup, sizes.total)
    shards = setup.gpus
    weights_here = weights / shards if setup.stage == 3 else weights
    gradients = sizes.trained * setup.trained_bytes / (shards if setup.stage >= 2 else 1)
    states = sizes.trained * (setup.state_bytes + (4 if setup.master else 0)) / (shards if setup.stage else 1)
    reference = 0.0
    if setup.reference:
        reference = _weight_bytes(sizes, setup, whole + sizes.trained) / (shards if setup.stage == 3 else 1)
    on_cpu = states if setup.offload_optimizer else 0.0
    if setup.offload_weights and setup.stage == 3:
        on_cpu += weights_here + reference
        weights_here = reference = 0.0
    activations, working = _activations(sizes, batch, setup)
    parts = {
        "weights": weights_here,
        "gradients": gradients,
        "optimizer": 0.0 if setup.offload_optimizer else states,
        "reference": reference,
        "activations": activations,
        "working": working,
        "buffers": _buffers(sizes, setup),
    }
    overhead = CUDA_BYTES + FRAGMENTATION * sum(parts.values()) if setup.accelerator else 0
    return Memory(**{name: round(value) for name, value in parts.items()}, overhead=round(overhead), cpu=round(on_cpu))


def _weight_bytes(sizes: Sizes, setup: Setup, count: int) -> float:
    """Of so many parameters: frozen ones in the model's type, or smaller; trained ones as they are trained."""
    trained = min(sizes.trained, count)
    quantized = sizes.quantized if setup.quantized_bytes else 0
    frozen = (count - trained - quantized) * setup.weight_bytes + quantized * setup.quantized_bytes
    return frozen + trained * setup.trained_bytes


def _buffers(sizes: Sizes, setup: Setup) -> float:
    """Buckets of DeepSpeed; without it, DDP's, which hold all gradients once more."""
    if setup.gpus == 1 or not sizes.trained:
        return 0.0
    if setup.stage == 0 and not setup.buckets:
        return sizes.trained * setup.trained_bytes
    gathered = min(setup.gathered, sizes.total) * setup.compute_bytes if setup.stage == 3 else 0
    return min(setup.buckets, sizes.total) * setup.compute_bytes + gathered


def _activations(sizes: Sizes, batch: Batch, setup: Setup) -> tuple[float, float]:
    """Bytes that wait for the backward pass, and those that are needed for a moment besides."""
    kept, moments = _edge_bytes(sizes, batch, setup), [_head_bytes(sizes, batch, setup)]
    stacks = [(sizes.text, sizes.text_flow, batch.tokens, _mask_bytes(sizes.text, batch, setup))]
    if sizes.vision is not None and batch.patches:
        stacks.append((sizes.vision, sizes.vision_flow, batch.patches, 0.0))
    for stack, flow, tokens, mask in stacks:
        layer = _layer_bytes(stack, flow, setup) * tokens + (mask if flow.passes else 0.0)
        moment = tokens * setup.compute_bytes * (2 * stack.inner + stack.width)
        if not flow.passes:
            moments.append(moment)
        elif setup.checkpointing:
            kept += stack.layers * stack.width * setup.stream_bytes * tokens
            moments.append(layer + moment)
        else:
            kept += stack.layers * layer
            moments.append(moment)
    return kept + _cast_bytes(sizes, setup), max(moments)


def _layer_bytes(stack: Stack, flow: Flow, setup: Setup) -> float:
    """What one layer keeps of one token for the backward pass."""
    if not flow.passes:
        return 0.0
    stream, compute = setup.stream_bytes, setup.compute_bytes
    has_inputs = flow.trained or flow.ranks > 0  # a frozen product needs its weights, and not what it was given
    norm = 4 + stream * flow.trained if stack.rms else stream  # in float32; scaled by weights that may be trained
    norms = stack.norms * stack.width * (norm + compute * has_inputs)
    repeated = setup.attention in ("sdpa", "eager")  # with a mask, keys and values are copied for every query head
    keys = stack.queries if repeated else stack.keys
    attention = compute * (2 * stack.queries + 2 * keys)
    if stack.normed_heads:
        attention += (4 + stream * flow.trained) * (stack.queries + stack.keys)
    forward = compute * stack.inner * (stack.wide - (not has_inputs))
    scales = 2 * stack.width * compute if stack.scaled and flow.trained else 0
    return norms + attention + forward + scales + compute * flow.ranks


def _mask_bytes(stack: Stack, batch: Batch, setup: Setup) -> float:
    """What the attention of one layer keeps of each pair of tokens: SDPA turns the mask of bools into numbers."""
    pairs = batch.rows * batch.length**2
    if setup.attention == "eager":
        return pairs * stack.heads * (setup.compute_bytes + 4)  # the matrix, and its softmax in float32
    return pairs * setup.compute_bytes if setup.attention == "sdpa" else 0.0


def _edge_bytes(sizes: Sizes, batch: Batch, setup: Setup) -> float:
    """What is kept outside of the layers: pixels, embeddings, projector, last norm, positions."""
    images = batch.patches / sizes.merge
    tower = sizes.vision.width * sizes.merge if sizes.vision is not None else 0
    projector = images * setup.compute_bytes * (2 * tower + 3 * sizes.text.width)
    ends = batch.tokens * (sizes.text.width * (8 + setup.stream_bytes) + 8 * sizes.text.queries / sizes.text.heads)
    return batch.patches * sizes.patch * 4 + projector + ends + batch.rows * batch.length**2


def _head_bytes(sizes: Sizes, batch: Batch, setup: Setup) -> float:
    """TRL's fused head: one tile of logits, gradients of what it was given, and of its weights in float32."""
    tile = min(batch.scored, HEAD_ROWS) * HEAD_TILE * setup.compute_bytes
    weights = sizes.vocabulary * sizes.text.width * 4 if sizes.head_trained else 0
    return tile + batch.scored * sizes.text.width * (4 + setup.stream_bytes) + weights


def _cast_bytes(sizes: Sizes, setup: Setup) -> float:
    """Autocast's copies of float32 weights: those that the backward pass needs, or, recomputed, the cached ones."""
    if setup.stream_bytes == setup.compute_bytes:
        return 0.0
    if setup.checkpointing:
        return sizes.trained * setup.compute_bytes
    flows = ((sizes.text, sizes.text_flow), (sizes.vision, sizes.vision_flow))
    return setup.compute_bytes * sum(stack.weights for stack, flow in flows if stack is not None and flow.passes)


def estimate_flops(sizes: Sizes, work: Work, *, checkpointing: bool) -> dict[str, float]:
    """Floating-point operations of forward and backward passes, by part; attention counts what is seen only.

    Args:
        sizes: Of the model.
        work: All rows of the step, or of an epoch.
        checkpointing: Layers are computed once more in the backward pass.

    Returns:
        `text` and `vision` of the policy, what is `recomputed`, and the `reference`, forward alone.

    >>> text = Stack(layers=1, width=10, inner=40, queries=10, keys=10, heads=1, weights=1000)
    >>> sizes = Sizes(text, None, vocabulary=0, total=1000, trained=1000)
    >>> estimate_flops(sizes, Work(tokens=2, visible=3, scored=0), checkpointing=False)["text"]
    12360.0
    """
    text = _stack_flops(sizes.text, work.tokens, work.visible)
    head = 2.0 * sizes.vocabulary * sizes.text.width * work.scored
    found = {"text": text * _passes(sizes.text_flow) + head * (2 + sizes.head_trained), "vision": 0.0}
    recomputed, forward = text * sizes.text_flow.passes + head, text + head  # the head computes its tiles again
    if sizes.vision is not None:
        vision = _stack_flops(sizes.vision, work.patches, work.patches_visible)
        projector = 2.0 * sizes.projector * work.patches / sizes.merge
        found["vision"] = vision * _passes(sizes.vision_flow) + projector * 3
        recomputed += vision * sizes.vision_flow.passes
        forward += vision + projector
    found["recomputed"] = recomputed if checkpointing else head
    found["reference"] = forward
    return found


def _stack_flops(stack: Stack, tokens: int, visible: int) -> float:
    return 2.0 * stack.weights * tokens + 4.0 * stack.queries * stack.layers * visible


def _passes(flow: Flow) -> int:
    """Forward, backward to what was given, backward to the weights: each takes as long."""
    return 1 + flow.passes + flow.trained
