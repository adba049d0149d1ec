"""Text encoder: captions to embeddings, with a model that `transformers` saved to a folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

MAX_TOKENS = 512  # of one caption, unless the encoder has a lower limit


def open_text_encoder(folder: str, device: torch.device | str | None = None) -> Callable[[str], Tensor]:
    """A function from a caption to its embeddings `[L, E]`, float16, without padding.

    folder: tokenizer and weights (safetensors only; nothing is downloaded, no code in the folder is run). Of an
    encoder-decoder the encoder is used, of a model of images and text the text model. Longer captions are truncated.
    Raises FileNotFoundError where there is no such folder, ValueError where it cannot be used.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json: expected the folder of a text encoder of Hugging Face")
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
        from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING as ENCODERS
    except ImportError:
        raise ValueError("captions need the package transformers: pip install 'msc-video[text]'") from None
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        config = AutoConfig.from_pretrained(path, **options)
        loader = AutoModelForTextEncoding if type(config) in ENCODERS else AutoModel
        model, report = loader.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{path} is not usable as text encoder: {str(error).splitlines()[0]}") from None
    model = getattr(model, "text_model", model)  # of CLIP and its like
    if missing := [name for name in report["missing_keys"] if name.removeprefix("text_model.") in model.state_dict()]:
        raise ValueError(f"{path} is not usable as text encoder: it has no {', '.join(missing[:3])}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    max_tokens = min(MAX_TOKENS, tokenizer.model_max_length)

    @lru_cache(maxsize=16)  # the clips of a video follow one another
    @torch.inference_mode()
    def embed(caption: str) -> Tensor:
        tokens = tokenizer(caption, truncation=True, max_length=max_tokens, return_tensors="pt").to(device)
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        embeddings = model(**inputs).last_hidden_state[0].to("cpu", torch.float16)
        if not torch.isfinite(embeddings).all():
            raise ValueError(f"embeddings of {caption[:80]!r} overflow 16-bit floats")
        return embeddings.clone()

    return embed
