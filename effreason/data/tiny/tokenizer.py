"""A character-level fast tokenizer with special tokens and chat template of the R1 family."""

from typing import Any

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
CHARACTERS = "\n ()*+-0123456789%=?;\\{}abdeiowtx"
# As byte-level tokenizers spell them: transformers expects this of a Qwen2 directory.
SPELLED = {"\n": "Ċ", " ": "Ġ"}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + "{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}" + ASSISTANT
    + "{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "<think>\n{% endif %}"
)


def build() -> Any:
    """Returns a transformers tokenizer: one id for each character, pad is EOS as in R1."""
    import tokenizers
    import transformers

    characters = [SPELLED.get(character, character) for character in CHARACTERS]
    vocabulary = [BOS, EOS, USER, ASSISTANT, "<think>", "</think>", "<unk>", *characters]
    # Byte-pair encoding without any merges leaves single characters.
    ids = {token: index for index, token in enumerate(vocabulary)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                             use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    # The think tags are not special, so that decoding keeps them: graders look for them.
    core.add_tokens([tokenizers.AddedToken(tag, special=False, normalized=False)
                     for tag in ("<think>", "</think>")])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=EOS, unk_token="<unk>",
        additional_special_tokens=[USER, ASSISTANT], chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False, model_max_length=1024)
