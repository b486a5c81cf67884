"""What `mue-hf bench` is made of: variants, the stock reference, peers, measuring, the record, its table and plot."""
