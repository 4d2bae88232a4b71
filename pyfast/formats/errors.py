"""The error that every reader of files raises."""


class CheckpointError(ValueError):
    """Error of a file that is not what it must be; the message names the file or its entry.

    Every function that reads files raises it: `load_adapter`, `Reformer.from_hf`,
    `pyfast.hf.load_quantized` and the modules' `load_state_dict`. It is a ValueError, too.

    Example:
        >>> import torch, pyfast
        >>> try:
        ...     pyfast.load_adapter(torch.nn.Linear(8, 8), "nowhere")
        ... except pyfast.CheckpointError as error:
        ...     print(error)
        nowhere/adapter_config.json cannot be read: No such file or directory
    """
