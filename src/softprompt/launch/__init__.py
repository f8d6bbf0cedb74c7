"""Several processes that train one run. They run the same `train` as one process does; nothing here is a loop.

`processes` starts them and imports no torch, `accelerated` is what each of them is handed, `sharded` splits a big base.
"""
