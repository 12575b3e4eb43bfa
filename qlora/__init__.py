"""Fine-tuning of language models on quantized weights: the trainer layer and the `qlora` command.

`cli` > `train`, `evaluate`, `demo` > `model`, `data` > `files`; every file imports only from below itself.
"""
