"""What `mue-hf bench` is made of: arms, the stock reference, peers, measuring, the record, its table and plot."""
