"""Types of the compiled module (csrc/bindings.cpp). It may be absent: only `puna.ops` imports it, and does without."""

def cpu_features() -> list[str]:
    """Instruction sets that this processor and its operating system support, as /proc/cpuinfo spells them."""
