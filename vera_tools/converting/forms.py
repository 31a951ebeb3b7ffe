"""Which forms of other programs can be brought in, and which are refused under their own names."""

from __future__ import annotations

#: What `from_foreign` maps exactly; its module says what each is.
FORMATS = ("peft", "peft-draft", "anima")

NO_MAPPING = "no exact mapping to VeRA"
#: Fragments of tensor names: what they belong to, and why that is not taken in.
REFUSED = {
    "vera_embedding_": ("PEFT-DRAFT-EMBEDDINGS", "it adapts embeddings, which VeRA has not done since PEFT 0.11"),
    "randlora_": ("RANDLORA", "RandLora sums many bases, VeRA has one"),
    "pvera_": ("PVERA", "PVeRA samples its vectors, VeRA's are fixed"),
    "vblora_": ("VBLORA", "VB-LoRA composes its matrices from a bank"),
    ".lora_A": ("LORA", "LoRA's matrices are trained, VeRA's are not"),
    ".lora_down.": ("LORA", "the vectors were multiplied into LoRA's matrices and cannot be taken out exactly"),
    "lokr_": ("LOKR", "it is a Kronecker product"),
}
