"""Fine-tuning of language models on quantized weights: the trainer layer and the `qlora` command.

`demo` > `cli` > `train` > `output`, `evaluate` > `options`, `pretrain` > `model`, `data` > `files`, `errors`;
every file imports only from below itself.
"""

import logging

# PEFT imports bitsandbytes, which then warns of a kernel that it does not download and nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
