"""Exports a `torch.nn.Module` as a record of its graph (`icenet.core.porting`)."""
