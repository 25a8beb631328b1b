"""Convert adapters from and to the format of the reference implementation (declare-lab/delta-Mem)."""
