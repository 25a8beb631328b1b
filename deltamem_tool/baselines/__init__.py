"""What a memory is compared with: a LoRA on the same base model, and retrieval with BM25."""
