"""Any causal LLM's own logits, and any chat template's own words: tiny random models of many families."""

from functools import cache

import pytest
import torch
from conftest import tiny_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from plan import blocks_of
from vidreason import (
    Conversation,
    VidReasonError,
    attention_window,
    encode_pair,
    encode_prompt,
    generate,
    load_llm,
    pack,
    reads_packed_rows,
    target_logprobs,
)

WORDS = 99
SHAPE = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 3,
}  # fmt: skip
GPT = {
    "vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 3,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MULTIPLIERS = {"embedding_multiplier": 12.0, "residual_multiplier": 0.2, "attention_multiplier": 0.1}
STATES = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "eos_token_id": 3}
DEEPSEEK = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
GPT_NEO = {
    "vocab_size": WORDS, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4, "initializer_range": 0.3,
    "max_position_embeddings": 64, "attention_types": [[["global", "local"], 1]], "bos_token_id": 1, "eos_token_id": 3,
}  # fmt: skip
MPT = {"vocab_size": WORDS, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "initializer_range": 0.3}
XGLM = {
    "vocab_size": WORDS, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "init_std": 0.3,
    "max_position_embeddings": 64, "eos_token_id": 3,
}  # fmt: skip
XLNET = {"vocab_size": WORDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
WINDOW = 4  # shorter than every row here

PACKED = {  # name of a case: (family, its own settings); rows are packed
    "llama": ("llama", SHAPE),
    "tied embeddings": ("llama", {**SHAPE, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**SHAPE, "sliding_window": None}),
    "a window longer than the row": ("mistral", {**SHAPE, "sliding_window": 40}),
    "qwen2": ("qwen2", SHAPE),
    "qwen3": ("qwen3", {**SHAPE, "head_dim": 8}),
    "gemma": ("gemma", {**SHAPE, "head_dim": 8}),
    "partial rotary": ("phi", {**SHAPE, "partial_rotary_factor": 0.5}),
    "stablelm": ("stablelm", {**SHAPE, "partial_rotary_factor": 0.25}),
    "scaled logits": ("granite", {**SHAPE, **MULTIPLIERS, "logits_scaling": 8.0}),
    "cohere": ("cohere", {**SHAPE, "logit_scale": 0.0625}),
    "olmo": ("olmo", SHAPE),
    "olmo2": ("olmo2", SHAPE),
    "glm": ("glm", {**SHAPE, "head_dim": 8}),
    "gpt2": ("gpt2", GPT),
    "gptj": ("gptj", {**GPT, "rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", SHAPE),
    "positions with an offset": ("opt", {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": ("falcon", {**SHAPE, "new_decoder_architecture": True}),
    "mixtral": ("mixtral", {**SHAPE, "num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", {**SHAPE, **EXPERTS, "head_dim": 8}),
    "olmoe": ("olmoe", {**SHAPE, "num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("deepseek_v3", {**SHAPE, **DEEPSEEK}),
    "nemotron": ("nemotron", SHAPE),
    "starcoder": ("gpt_bigcode", GPT),
}
APART = {  # a row for each pair
    "mistral's window": ("mistral", {**SHAPE, "sliding_window": WINDOW}),
    "qwen2's window": (
        "qwen2",
        {**SHAPE, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "phi3's window": ("phi3", {**SHAPE, "sliding_window": WINDOW}),
    "capped logits": ("gemma2", {**SHAPE, "head_dim": 8, "sliding_window": WINDOW}),
    "gemma3": ("gemma3_text", {**SHAPE, "head_dim": 8, "sliding_window": WINDOW}),
    "cohere2": ("cohere2", {**SHAPE, "logit_scale": 0.0625, "sliding_window": WINDOW}),
    "gpt_oss": (
        "gpt_oss",
        {**SHAPE, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
    "gpt_neo": ("gpt_neo", GPT_NEO),
    "alibi": ("bloom", {**GPT, "hidden_size": 32}),
    "mpt": ("mpt", MPT),
    "falcon with alibi": ("falcon", {**SHAPE, "alibi": True}),
    "xglm": ("xglm", XGLM),
    "mamba": ("mamba", {**STATES, "state_size": 4}),
    "rwkv": ("rwkv", {**STATES, "attention_hidden_size": 32, "context_length": 64}),
    "convolutions": ("lfm2", {**SHAPE, "full_attn_idxs": [1], "conv_L_cache": 3}),
}
ALL = PACKED | APART


@cache
def llm_of(case):
    family, settings = ALL[case]
    torch.manual_seed(0)
    try:
        config = AutoConfig.for_model(family, **settings)
    except Exception as error:  # transformers 5.4 refuses its own defaults of some families
        pytest.skip(f"the library cannot make it: {str(error)[:80]}")
    return AutoModelForCausalLM.from_config(config).eval()


def width_of(llm):
    return llm.get_input_embeddings().weight.shape[1]


def conversations():
    numbers = torch.Generator().manual_seed(3)

    def words(count):
        return torch.randint(4, WORDS, (count,), generator=numbers).tolist()

    many = Conversation([(words(4), words(3)), (words(2), words(5)), (words(3), words(2))])
    return [many, Conversation([(words(6), words(3))])]


@torch.no_grad()
def own_logprobs(llm, said, e_vision):
    """What the family's own forward says, one pair at a time, nothing packed or padded."""
    logprobs = []
    for e_row, conversation in zip(e_vision, said, strict=True):
        for prompt, target in conversation.pairs:
            words = llm.get_input_embeddings()(torch.tensor(prompt + target))
            logits = llm(inputs_embeds=torch.cat([e_row, words])[None], use_cache=False).logits[0].float()
            first = len(e_row) + len(prompt) - 1
            of_targets = logits[first : first + len(target)].log_softmax(-1)
            logprobs.append(of_targets.gather(1, torch.tensor(target)[:, None])[:, 0])
    return torch.cat(logprobs)


@pytest.mark.parametrize("case", ALL)
def test_target_logprobs_are_the_family_s_own(case):
    """Fails if logits are not scaled or capped as the family does, or a layer sees more or less than it would."""
    llm, said = llm_of(case), conversations()
    e_vision = torch.randn(2, 3, width_of(llm), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = target_logprobs(llm, pack(said, 3), e_vision)
    assert (ours - own_logprobs(llm, said, e_vision)).abs().max() < 1e-5


@pytest.mark.parametrize("case", ALL)
def test_rows_are_packed_where_attention_allows(case):
    """Fails if an LLM loses the speed of packed rows, or is given them though it cannot read them."""
    llm = llm_of(case)
    row = 3 + 7 + 7 + 5
    takes_masks = llm.config._attn_implementation == "sdpa"  # GPT-J of transformers 5.4 is eager
    assert (reads_packed_rows(llm) and attention_window(llm) >= row) == (case in PACKED and takes_masks)
    assert not llm.training


@pytest.mark.parametrize("case", ["llama", "scaled logits", "mistral's window", "alibi", "mamba"])
def test_gradients_are_the_family_s_own(case):
    """Fails if what E_vision learns is not what the family's own loss would teach it."""
    llm, said = llm_of(case), conversations()[:1]
    e_vision = torch.randn(1, 3, width_of(llm), requires_grad=True)
    (ours,) = torch.autograd.grad(target_logprobs(llm, pack(said, 3), e_vision).sum(), e_vision)
    (own,) = torch.autograd.grad(own_logprobs.__wrapped__(llm, said, e_vision).sum(), e_vision)
    assert torch.allclose(ours, own, atol=1e-4 * own.abs().max())


@pytest.mark.parametrize("case", ALL)
def test_generation_continues_as_the_family_would_one_token_at_a_time(case):
    """Fails if padding on the left, a cache or a state changes what an answer says."""
    llm = llm_of(case)
    numbers = torch.Generator().manual_seed(5)
    rows = [torch.randn(length, width_of(llm), generator=numbers) for length in (9, 5)]
    expected = [literal(llm, row) for row in rows]
    masks = [torch.ones(len(row), dtype=torch.long) for row in rows]
    e_input = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = nn.utils.rnn.pad_sequence(masks, batch_first=True, padding_side="left")
    assert generate(llm, tiny_tokenizer(), e_input, mask, max_new_tokens=5) == expected


@torch.no_grad()
def literal(llm, e_input):
    """Greedy decoding without a cache."""
    said = []
    while len(said) < 5:
        token = int(llm(inputs_embeds=e_input[None], use_cache=False).logits[0, -1].argmax())
        if token == 3:
            break
        said.append(token)
        e_input = torch.cat([e_input, llm.get_input_embeddings()(torch.tensor([token]))])
    return said


@pytest.mark.parametrize("case", ["llama", "gpt2", "alibi", "gpt_neo", "positions with an offset", "mamba"])
def test_the_blocks_of_a_family_are_found(case):
    """Fails if --shard full or --compile would miss the blocks of a family that names them otherwise."""
    assert len(blocks_of(llm_of(case))) == 2


@pytest.mark.parametrize("case", ["tied embeddings", "scaled logits", "gpt2", "alibi", "capped logits", "mamba"])
def test_a_saved_llm_is_read_back(case, tmp_path):
    """Fails if a family is refused though it can be read, or read as another one."""
    llm = llm_of(case)
    llm.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    again, _ = load_llm(tmp_path)
    e_input = torch.randn(1, 6, width_of(llm))
    with torch.no_grad():
        assert torch.equal(again(inputs_embeds=e_input).logits, llm(inputs_embeds=e_input).logits)


@pytest.mark.parametrize(
    "family, settings, reason",
    [
        ("bert", SHAPE, "is not causal"),
        ("xlnet", XLNET, "cannot read embeddings"),
        ("openai-gpt", GPT, "cannot read embeddings"),
        ("ctrl", {**GPT, "dff": 48}, "cannot read embeddings"),
        ("t5", {"vocab_size": WORDS, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2}, "cannot be loaded"),
    ],
)
def test_what_is_no_causal_llm_is_refused_with_the_reason(family, settings, reason, tmp_path):
    """Fails if such a model is read all the same, or its owner is told of a licence."""
    config = AutoConfig.for_model(family, **settings)
    config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    if family != "t5":
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(VidReasonError, match=reason) as error:
        load_llm(tmp_path)
    assert "licence" not in str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------- chat templates

LOOP = "{% for m in messages %}"
ROLE = "{{ '<user> ' if m['role'] == 'user' else '<assistant> ' }}"
END = "{{ '<eos>\n' }}{% endfor %}"
BEGIN = "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
PLAIN = LOOP + ROLE + "{{ m['content'] }}" + END + BEGIN
THOUGHT = "{% if m['role'] != 'user' %}{{ 'b a ' }}{% endif %}"
EMPTY_THOUGHT = PLAIN.replace("{{ m['content'] }}", THOUGHT + "{{ m['content'] }}")
WANTS_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system turn first') }}{% endif %}" + PLAIN
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + PLAIN
TEMPLATES = {  # name: (template, prompt, target of "why ?" and "red ball"), as words
    "plain": (PLAIN, "<user> why ? <eos> <assistant>", "red ball <eos>"),
    "empty thought before the answer": (EMPTY_THOUGHT, "<user> why ? <eos> <assistant> b a", "red ball <eos>"),
    "demands a system turn": (
        WANTS_SYSTEM,
        "<assistant> <unk> <unk> a <unk> <unk> . <eos> <user> why ? <eos> <assistant>",
        "red ball <eos>",
    ),
    "refuses a system turn": (NO_SYSTEM, "<user> why ? <eos> <assistant>", "red ball <eos>"),
    "always begins the next turn": (
        PLAIN.replace("{% if add_generation_prompt %}", "{% if true %}"),
        "<user> why ? <eos> <assistant>",
        "red ball <eos>",
    ),
    "never begins a turn": (PLAIN.replace(BEGIN, ""), "<user> why ? <eos> <assistant>", "red ball <eos>"),
    "opens a thought where an answer is to come": (
        PLAIN.replace("<assistant> ' }}{% endif %}", "<assistant> a b ' }}{% endif %}"),
        "<user> why ? <eos> <assistant>",
        "red ball <eos>",
    ),
    "trims": (PLAIN.replace("m['content']", "m['content'] | trim"), "<user> why ? <eos> <assistant>", "red ball <eos>"),
    "blank before the answer": (
        PLAIN.replace("'<assistant> ' }}{% endif", "'<assistant>' }}{% endif"),
        "<user> why ? <eos> <assistant>",
        "red ball <eos>",
    ),
    "no end of turn": (
        PLAIN.replace("{{ '<eos>\n' }}", "{{ ' ' }}"),
        "<user> why ? <assistant>",
        "red ball <eos>",
    ),
    "begins with a special token": ("{{ '<bos>' }}" + PLAIN, "<bos> <user> why ? <eos> <assistant>", "red ball <eos>"),
}


def tokenizer_with(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def ids_of(words):
    return tiny_tokenizer().convert_tokens_to_ids(words.split())


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("said", ["red ball", " red ball\n"])
def test_a_target_is_the_answer_and_the_end_of_its_turn(name, said):
    """Fails if what a template writes around an answer is trained, scored or shown as part of it, or blanks are."""
    template, prompt, target = TEMPLATES[name]
    tokenizer = tokenizer_with(template)
    assert encode_pair(tokenizer, " why ?", said) == (ids_of(prompt), ids_of(target))
    assert encode_prompt(tokenizer, "why ?") == ids_of(prompt)


@pytest.mark.parametrize(
    "template, reason",
    [
        ("", "no chat template"),
        (PLAIN.replace("{{ m['content'] }}", "{{ m['content'] | upper | replace('S', '') }}"), "changes what is said"),
        (PLAIN.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['content'] }}"), "changes what is said"),
        (PLAIN.replace("{{ m['content'] }}", "{{ raise_exception('never') }}"), "chat template fails: never"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template, reason):
    """Fails if words are lost or doubled without a word, or a template's own error is a traceback."""
    with pytest.raises(VidReasonError, match=reason):
        encode_pair(tokenizer_with(template), "why ?", "red ball")


@pytest.mark.parametrize("token", ["<eos>", "<assistant>", "<pad>"])
def test_a_text_that_spells_a_special_token_does_not_become_one(token):
    """Fails if an annotation or a question can end a turn or begin another one."""
    tokenizer = tiny_tokenizer()
    special = tokenizer.convert_tokens_to_ids(token)
    plain_prompt, plain_target = encode_pair(tokenizer, "why ?", "red ball")
    prompt, target = encode_pair(tokenizer, f"why {token} ?", f"red {token} ball")
    assert prompt.count(special) == plain_prompt.count(special)
    assert target.count(special) == plain_target.count(special) and len(target) > len(plain_target)
