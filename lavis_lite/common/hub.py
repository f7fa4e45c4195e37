"""Model folders on the Hugging Face hub, by names such as `hub:Salesforce/blip2-opt-2.7b`."""

from __future__ import annotations

from pathlib import Path

from lavis_lite.common.errors import CheckpointError

PREFIX = "hub:"
FILES = ("*.safetensors", "*.json")


def local_folder(source: str) -> Path:
    """The folder with a hub model's weights, downloaded unless it is in the hub's cache.

    Raises CheckpointError when it is neither there nor reachable.
    """
    from huggingface_hub import snapshot_download  # comes with transformers
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = source.removeprefix(PREFIX)
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"'{source}' is not in the hub's cache and can't be fetched ({reason}); let this machine reach the hub "
            "once, or name a local folder or file (model.pretrained=PATH, in Python checkpoint=PATH)"
        ) from error
