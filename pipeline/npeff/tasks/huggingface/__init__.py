"""Tasks with Hugging Face models. Each family of models is a module with its options and its examples."""

import logging

_LINES = {
    "torchao": "Failed to load",  # kernels for GPUs that this machine does not have
    "torch.utils._pytree": "Enum subclass",  # torchao registers two, which torch now knows by itself
    "bitsandbytes.autograd._functions": "inputs will be cast",  # at every call
}
"""Parts of log lines that say nothing to a user, by logger. transformers and PEFT import torchao and bitsandbytes where
they are installed, also for models without quantized weights."""

for _logger, _text in _LINES.items():
    logging.getLogger(_logger).addFilter(lambda record, text=_text: text not in record.getMessage())  # type: ignore[misc]
