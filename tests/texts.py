"""Digit captions, tiny tokenizers and the processor of every image-text family: made here, nothing downloaded.

`TEXT_IDS` belongs into the text config of every tiny model. Without it the CLIP and MetaCLIP 2 text models look for
the end token of the published vocabulary (49407), do not find it, and pool position 0, the start token, whose state
is the same for every text because the mask is causal.
"""

import json

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AltCLIPProcessor,
    ChineseCLIPProcessor,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipProcessor,
)
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

SIDE, PATCH, LENGTH, VOCAB = 32, 8, 16, 99  # as in `families`: pixels, pixels, tokens, vocabulary

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = ("upper left", "upper right", "lower left", "lower right")
_WORDS = """
    a an the of in on at and with no this is are there photo picture image digit digits number
    upper lower left right corner center middle top bottom above below next to
    red green blue white black grey background large small handwritten 0 1 2 3 4 5 6 7 8 9
"""
# The end token has the highest id: a CLIP text config with eos_token_id 2 (as first published) pools the highest id of
# a sequence, every other config the first eos_token_id. Here both find it.
_TOKENS = ("<bos>", "<pad>", "<unk>", *_WORDS.split(), *DIGITS, "<eos>")
VOCABULARY = {token: index for index, token in enumerate(_TOKENS)}
BOS, PAD, UNK, EOS = (VOCABULARY[token] for token in ("<bos>", "<pad>", "<unk>", "<eos>"))
TEXT_IDS = {"bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS}

TEXT_FAMILIES = ("clip", "metaclip2", "siglip", "siglip2", "chinese_clip", "altclip")
# Positions of AltCLIP (a RoBERTa) start after the id of the padding token: that many places of its table stay unused.
LENGTHS = {family: LENGTH - PAD - 1 if family == "altclip" else LENGTH for family in TEXT_FAMILIES}
_INPUTS = {
    "siglip": ["input_ids"],  # SigLIP was trained to read the padding, so its processors hand no mask on
    "siglip2": ["input_ids"],
    "chinese_clip": ["input_ids", "token_type_ids", "attention_mask"],
}


def captions(count=20):
    """Different captions, as many as asked (at most 50): digit by digit, the plain ones first."""
    plain = [f"a photo of a {word}" for word in DIGITS]
    placed = [f"the digit {digit} in the {place} corner" for place in PLACES for digit in range(10)]
    return (plain + placed)[:count]


def tokenizer(family="clip"):
    """`<bos> words <eos>`, padded on the right; SigLIP 2 has pieces of words and no `<bos>`."""
    settings = {
        "bos_token": "<bos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "eos_token": "<eos>",
        "model_max_length": LENGTHS[family],
        "model_input_names": _INPUTS.get(family, ["input_ids", "attention_mask"]),
        "padding_side": "right",
    }
    if family == "siglip2":
        return _siglip2_tokenizer(settings)
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, **settings)


def _siglip2_tokenizer(settings):
    """The class that AutoTokenizer takes for SigLIP 2 whatever was saved: from words it would read other ids."""
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.normalizer = normalizers.Replace(" ", "▁")
    special = ["<bos>", "<pad>", "<unk>", "<eos>", "<mask>"]
    learned.train_from_iterator(
        captions(50), trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False)
    )
    model = json.loads(learned.to_str())["model"]
    pieces = Siglip2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], **settings)
    pieces.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", pieces.eos_token_id)]
    )
    return pieces


def processor(family="clip", side=SIDE, patch=PATCH):
    """The family's processor for square images of `side` pixels; saved and loaded without torchvision.

    Call `Siglip2Processor` with `SIGLIP2_CALL`: its class holds defaults that win over what it was made with.
    """
    square = {"height": side, "width": side}
    cropped = {"size": {"shortest_edge": side}, "crop_size": square}
    words = tokenizer(family)
    if family in ("clip", "metaclip2"):  # AutoProcessor gives MetaCLIP 2 the CLIP processor
        return CLIPProcessor(CLIPImageProcessorPil(**cropped), words)
    if family == "altclip":
        return AltCLIPProcessor(CLIPImageProcessorPil(**cropped), words)
    if family == "chinese_clip":
        return ChineseCLIPProcessor(ChineseCLIPImageProcessorPil(**cropped), words)
    if family == "siglip":
        return SiglipProcessor(SiglipImageProcessorPil(size=square), words)
    if family == "siglip2":
        return Siglip2Processor(
            Siglip2ImageProcessorPil(patch_size=patch, max_num_patches=(side // patch) ** 2), words
        )
    raise ValueError(f"no processor for {family!r}; there are {TEXT_FAMILIES}")


SIGLIP2_CALL = {"patch_size": PATCH, "max_num_patches": (SIDE // PATCH) ** 2, "max_length": LENGTH}


def encode(family, texts):
    """Token tensors of texts as the family was trained: all padded to the full length, cut where longer."""
    return tokenizer(family)(
        texts, padding="max_length", truncation=True, max_length=LENGTHS[family], return_tensors="pt"
    )
