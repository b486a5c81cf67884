"""MuETrainer: transformers' Seq2SeqTrainer with MuE's layer-wise loss."""
