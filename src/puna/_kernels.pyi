"""Types of the compiled module (csrc/bindings.cpp). It may be absent: only `puna.ops` imports it, and does without.

The kernels take addresses and sizes; csrc/kernels/args.h says what each one computes, `puna.ops.cpu` calls them.
"""

def cpu_features() -> list[str]:
    """Instruction sets that this processor and its operating system support, as /proc/cpuinfo spells them."""

def supported_levels() -> list[str]:
    """The instruction levels of the kernels that run here, the best first."""

def level() -> str:
    """The level in use."""

def set_level(level: str) -> None:
    """Chooses the level of all later calls. Raises ValueError for one that the processor cannot run."""

def threads() -> int:
    """How many threads kernels run on."""

def set_threads(count: int) -> None:
    """Chooses how many threads all later calls run on. Raises ValueError below 1 and above 1024."""

def bf16_dots() -> bool:
    """Whether bfloat16 rows meet bfloat16 weights in vdpbf16ps (level avx512 alone), which pays on AMD's processors."""

def set_bf16_dots(uses: bool) -> None:
    """Chooses it for all later calls, instead of what the processor suggests; the bits of results change."""

def linear(
    x: int,
    weight: int,
    bias: int,
    y: int,
    x_stride: int,
    y_stride: int,
    rows: int,
    inputs: int,
    outputs: int,
    dense: int,
    bits: int,
    groups: int,
    minimums: int,
    x_dtype: int,
    y_dtype: int,
    activation: int,
    gated: bool,
) -> None: ...
def embedding(
    ids: int,
    table: int,
    y: int,
    rows: int,
    vocabulary: int,
    inputs: int,
    table_stride: int,
    is_panels: bool,
    dense: int,
    bits: int,
    groups: int,
    minimums: int,
    y_dtype: int,
) -> None: ...
def rms_norm(
    x: int,
    residual: int,
    weight: int,
    sum: int,
    y: int,
    outer: int,
    inner: int,
    size: int,
    x_outer_stride: int,
    x_inner_stride: int,
    epsilon: float,
    dtype: int,
) -> None: ...
def add(a: int, b: int, y: int, count: int, dtype: int) -> None: ...
def gated_activation(gate_up: int, y: int, rows: int, size: int, activation: int, dtype: int) -> None: ...
def rotary(
    x: int,
    cos: int,
    sin: int,
    y: int,
    tokens: int,
    heads: int,
    head_size: int,
    x_stride: int,
    angle_stride: int,
    dtype: int,
) -> None: ...
def store_kv(
    key: int,
    value: int,
    slots: int,
    tokens: int,
    key_stride: int,
    value_stride: int,
    dtype: int,
    keys: int,
    values: int,
    blocks: int,
    kv_heads: int,
    block_size: int,
    head_size: int,
    cache_dtype: int,
) -> None: ...
def paged_attention(
    query: int,
    y: int,
    block_tables: int,
    query_starts: int,
    sequence_lengths: int,
    sequences: int,
    heads: int,
    query_stride: int,
    table_stride: int,
    table_width: int,
    window: int,
    scale: float,
    dtype: int,
    keys: int,
    values: int,
    blocks: int,
    kv_heads: int,
    block_size: int,
    head_size: int,
    cache_dtype: int,
) -> None: ...
def experts(
    x: int,
    router_logits: int,
    gate_up: int,
    proj: int,
    y: int,
    tokens: int,
    hidden: int,
    inner: int,
    count: int,
    top: int,
    dense: int,
    bits: int,
    groups: int,
    minimums: int,
    proj_dense: int,
    proj_bits: int,
    proj_groups: int,
    proj_minimums: int,
    activation: int,
    dtype: int,
) -> None: ...
def probe(kind: int, memory: int, bytes: int, iterations: int, operations: int) -> None: ...
def round_groups(
    rows: int, panels: int, first: int, count: int, inputs: int, stride: int, bits: int, dtype: int
) -> None: ...
def argmax(x: int, indices: int, values: int, rows: int, size: int, x_stride: int) -> None: ...
def draw(
    x: int,
    temperature: int,
    top_k: int,
    top_p: int,
    min_p: int,
    uniform: int,
    tokens: int,
    highest: int,
    rows: int,
    size: int,
    x_stride: int,
) -> None: ...

class Recording:
    """A list of kernel calls, made once and replayed without Python."""

    def __init__(self) -> None: ...
    def begin(self) -> None:
        """This thread's kernel calls are appended from here on instead of run."""

    def end(self) -> None: ...
    def replay(self) -> None:
        """Runs all calls in order. Raises IndexError for token ids and blocks out of range."""

    def profile(self) -> list[tuple[str, float]]:
        """The same, and the name of each call's kernel beside the seconds that it took with its barrier."""

    def __len__(self) -> int: ...
