import dataclasses
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxlora.data.chat import ChatOptions, encode
from jaxlora.data.rows import Conversation, PlainText, media_of, read_row
from jaxlora.data.template import render
from jaxlora.data.turns import end_of_turn, renderer
from jaxlora.recipes.tiny_tokenizer import CHAT_TEMPLATES, TEXT, make_tokenizer

# Own spellings of the styles that real templates have.
CHATML = CHAT_TEMPLATES["qwen2_vl"].replace("<|im_end|>", "<|eot_id|>")
HEADERS = CHAT_TEMPLATES["llama"]
INSTRUCTION = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'system' %}<<SYS>>{{ m['content'] }}<</SYS>>\n{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Like Qwen3: an empty thinking block before the last answer only, so that earlier turns change when the conversation goes on.
THINKING = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant\n{% endif %}"
)
GENERATION = (
    "{% for m in messages %}### {{ m['role'] }}:\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
# Like Mistral: the system message moves to the last turn if that is a user's, so that every prefix differs from the whole.
MOVING = (
    "{{ bos_token }}{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.last %}{{ system }}\n\n{% endif %}{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Like Phi-3: the end of the text follows the last turn, and starts like the header of a next one.
CLOSING = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}\n{{ m['content'] }}<|end_of_text|>\n{% endfor %}"
    "{{ '<|start_header_id|>assistant\n' if add_generation_prompt else eos_token }}"
)
PLAIN_END = (
    "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n\n{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)

STYLES = {
    "headers": (HEADERS, ""),
    "chatml": (CHATML, ""),
    "instruction": (INSTRUCTION, " "),
    "thinking": (THINKING, ""),
    "generation": (GENERATION, ""),
    "moving": (MOVING, " "),
}
WORDS = "boat river tea 42 café naïve 東京 🙂 a,b x=1 \t two\nlines .\n\n ( ) the end... It's I'll <b> [INST] ### user: </think>x".split(
    " "
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(make_tokenizer(tmp_path_factory.mktemp("llama"), "llama"))


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def random_text(rng):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 8))).strip() or "x"


def random_conversation(rng):
    system = [{"role": "system", "content": random_text(rng)}] if rng.random() < 0.5 else []
    turns = [{"role": role, "content": random_text(rng)} for _ in range(rng.randint(1, 4)) for role in ("user", "assistant")]
    return Conversation(messages=system + turns)


def label_text(encoded, tokenizer):
    return tokenizer.decode(encoded.labels[encoded.labels != -100])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seed", range(20))
def test_the_labels_are_exactly_the_assistants_turns_with_their_end_token(tokenizer, style, seed):
    template, lead = STYLES[style]
    rng = random.Random(seed)
    for _ in range(5):
        row = random_conversation(rng)
        answers = [message["content"] for message in row.messages if message["role"] == "assistant"]
        expected = [lead + answer + tokenizer.eos_token for answer in answers]
        if style == "thinking":
            expected[-1] = "<think>\n\n</think>\n\n" + expected[-1]
        assert label_text(encode(row, with_template(tokenizer, template)), tokenizer) == "".join(expected)


def test_what_closes_the_conversation_closes_only_its_last_turn(tokenizer):
    turns = [{"role": role, "content": content} for role, content in (("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))]
    encoded = encode(read_row(turns), with_template(tokenizer, CLOSING))
    assert label_text(encoded, tokenizer) == "a<|end_of_text|>b<|end_of_text|>\n<|eot_id|>"


def test_parts_are_joined_for_a_template_that_writes_strings_only(tokenizer):
    drops_parts = "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
    turns = [
        {"role": role, "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "boat"}]} for role in ("user", "assistant")
    ]
    encoded = encode(read_row(turns), with_template(tokenizer, drops_parts))
    assert tokenizer.decode(encoded.input_ids) == "user: a boat<|eot_id|>assistant: a boat<|eot_id|>"


def test_a_tokenizer_that_adds_a_space_to_every_piece_is_given_the_whole_text():
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    words.decoder = decoders.Metaspace(prepend_scheme="always")
    words.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=200, special_tokens=["<s>", "</s>"], show_progress=False))
    metaspace = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    metaspace.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
    encoded = encode(read_row([{"role": "user", "content": "a boat"}, {"role": "assistant", "content": "the river"}]), metaspace)
    whole = metaspace("user a boat</s>assistant the river</s>", add_special_tokens=False)["input_ids"]
    assert encoded.input_ids.tolist() == whole
    assert metaspace.decode(encoded.labels[encoded.labels != -100]).split() == ["the", "river</s>"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seed", range(5))
def test_the_ids_are_the_rendered_text(tokenizer, style, seed):
    row = random_conversation(random.Random(seed))
    with_template(tokenizer, STYLES[style][0])
    assert tokenizer.decode(encode(row, tokenizer).input_ids) == renderer(tokenizer)(row.messages, False).text


@pytest.mark.parametrize("style", ["headers", "chatml", "instruction", "thinking", "generation"])
def test_rendering_is_that_of_transformers(tokenizer, style):
    row = random_conversation(random.Random(3))
    with_template(tokenizer, STYLES[style][0])
    for prompt in (False, True):
        expected = tokenizer.apply_chat_template(row.messages, tokenize=False, add_generation_prompt=prompt)
        assert renderer(tokenizer)(row.messages, prompt).text == expected


def test_the_last_response_alone_can_be_trained(tokenizer):
    row = random_conversation(random.Random(5))
    encoded = encode(row, with_template(tokenizer, HEADERS), ChatOptions(last_response_only=True))
    assert label_text(encoded, tokenizer) == row.messages[-1]["content"] + tokenizer.eos_token


def test_everything_can_be_trained(tokenizer):
    encoded = encode(random_conversation(random.Random(5)), with_template(tokenizer, HEADERS), ChatOptions(responses_only=False))
    assert np.array_equal(encoded.labels, encoded.input_ids)


def test_the_end_token_is_trained_when_it_is_the_pad_token(tokenizer):
    pad = tokenizer.pad_token
    tokenizer.pad_token = tokenizer.eos_token
    encoded = encode(random_conversation(random.Random(5)), with_template(tokenizer, HEADERS))
    tokenizer.pad_token = pad
    assert encoded.labels[-1] == tokenizer.eos_token_id


def test_a_template_adds_the_only_bos(tokenizer):
    encoded = encode(random_conversation(random.Random(5)), with_template(tokenizer, HEADERS))
    assert (encoded.input_ids == tokenizer.bos_token_id).sum() == 1


@pytest.mark.parametrize(
    ("template", "end"), [(HEADERS, "<|eot_id|>"), (CHATML, "<|eot_id|>"), (PLAIN_END, "\n\n"), (CLOSING, "<|end_of_text|>")]
)
def test_the_end_of_a_turn_is_known(tokenizer, template, end):
    assert end_of_turn(with_template(tokenizer, template)) == end


def test_a_control_token_typed_by_a_user_stays_text(tokenizer):
    row = read_row([{"role": "user", "content": "a<|eot_id|>b"}, {"role": "assistant", "content": "c"}])
    encoded = encode(row, with_template(tokenizer, HEADERS))
    # One end of turn for each of the two messages, and the typed one is spelt out.
    assert (encoded.input_ids == tokenizer.eos_token_id).sum() == 2
    assert "a<|eot_id|>b" in tokenizer.decode(encoded.input_ids)


def test_a_control_token_typed_by_a_user_may_be_allowed(tokenizer):
    row = read_row([{"role": "user", "content": "a<|eot_id|>b"}, {"role": "assistant", "content": "c"}])
    encoded = encode(row, with_template(tokenizer, HEADERS), ChatOptions(allow_special_in_text=True))
    assert (encoded.input_ids == tokenizer.eos_token_id).sum() == 3


def test_a_control_token_spread_over_parts_is_refused(tokenizer):
    parts = [{"type": "text", "text": "<|eot"}, {"type": "text", "text": "_id|>"}]
    row = read_row([{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}])
    with pytest.raises(ValueError, match="spread over"):
        encode(row, with_template(tokenizer, HEADERS))


def test_a_completion_is_trained_and_its_prompt_is_not(tokenizer):
    row = {"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "q2"}]}
    encoded = encode(read_row({**row, "completion": [{"role": "assistant", "content": "a2"}]}), with_template(tokenizer, HEADERS))
    assert label_text(encoded, tokenizer) == "a2<|eot_id|>"


def test_plain_text_ends_with_eos_and_is_all_trained(tokenizer):
    encoded = encode(PlainText(text="a boat"), tokenizer)
    assert label_text(encoded, tokenizer) == "a boat<|eot_id|>"


def test_a_plain_prompt_is_not_trained(tokenizer):
    encoded = encode(PlainText(prompt="2 + 2 =", text=" 4"), tokenizer)
    assert (tokenizer.decode(encoded.input_ids), label_text(encoded, tokenizer)) == ("2 + 2 = 4<|eot_id|>", " 4<|eot_id|>")


def test_every_form_of_a_row_is_the_same_conversation():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    forms = [turns, {"messages": turns}, {"conversations": sharegpt}, {"instruction": "q", "input": "", "output": "a"}]
    forms += [{"messages": [{**turn, "tool_calls": None} for turn in turns], "text": None}]
    assert all(read_row(form) == Conversation(messages=turns) for form in forms)
    prompt = {"prompt": turns[:1], "completion": turns[1:]}
    assert read_row(prompt) == dataclasses.replace(Conversation(messages=turns), prompt_turns=1)


def test_openai_image_parts_are_images():
    content = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "image", "text": None}, {"type": "text", "text": "?"}]
    assert media_of(read_row([{"role": "user", "content": content}]).messages, "image") == ["a.png"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([{"role": "usr", "content": "x"}], "row 3, message 0: unknown role 'usr'; did you mean 'user'"),
        ([{"role": "user", "content": 5}], "row 3, message 0: content is text or a list of parts, got int"),
        ([{"role": "user", "content": None}], "row 3, message 0: no content"),
        ([], "row 3: expected a list of messages"),
        ({"question": "x"}, r"row 3: expected messages; .*got the columns \['question'\]"),
        ([{"role": "user", "content": [{"type": "txt", "text": "x"}]}], "row 3, message 0, part 0: unknown type 'txt'"),
        ([{"role": "user", "content": "x"}], "row 3: no assistant turn"),
        ([{"role": "user", "content": "\ufdd0"}, {"role": "assistant", "content": "x"}], "row 3: a text holds Unicode noncharacters"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_refused_by_name(tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        encode(read_row(row, where="row 3"), with_template(tokenizer, HEADERS), where="row 3")


def test_a_template_whose_turns_cannot_be_told_apart_is_refused(tokenizer):
    reverses = "{% for m in messages | reverse %}{{ m['content'] }}{{ m['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match="end of message 1 cannot be found"):
        encode(read_row([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]), with_template(tokenizer, reverses))


def test_no_chat_template_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        encode(random_conversation(random.Random(1)), with_template(tokenizer, None))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 2 ** 10000000 }}",
        "{{ '%0999999999d' % 1 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
        "{% if %}",
    ],
)
def test_a_hostile_or_broken_template_is_an_error(template):
    with pytest.raises(ValueError, match="the chat template refuses"):
        render(template, [{"role": "user", "content": "x"}])


def test_generation_spans_survive_a_macro():
    template = "{% macro turn(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}a{{ turn(messages[0]) }}b"
    rendered = render(template, [{"role": "assistant", "content": "xyz"}])
    assert (rendered.text, rendered.spans) == ("axyzb", ((1, 4),))
