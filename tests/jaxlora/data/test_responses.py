import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxlora.data.responses import Marker, Markers, make_markers, mask_to_responses, template_markers
from jaxlora.recipes.tiny_tokenizer import make_tokenizer

USER, ANSWER = "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(make_tokenizer(tmp_path_factory.mktemp("llama"), "llama"))


def ids(tokenizer, *turns):
    text = tokenizer.apply_chat_template([{"role": role, "content": content} for role, content in turns], tokenize=False)
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"])


def trained(tokenizer, labels):
    return tokenizer.decode(labels[labels != -100])


CHAT = [("system", "s"), ("user", "q1"), ("assistant", "the boat"), ("user", "q2"), ("assistant", "a river")]


@pytest.mark.parametrize("parts", [(USER, ANSWER), (None, None)])
@pytest.mark.parametrize("force_match", [True, False])
def test_responses_are_trained_with_their_end_token(tokenizer, parts, force_match):
    markers = make_markers(tokenizer, *parts, force_match=force_match)
    [labels] = mask_to_responses([ids(tokenizer, *CHAT)], None, markers)
    assert trained(tokenizer, labels) == "the boat<|eot_id|>a river<|eot_id|>"


def test_only_the_last_response_may_be_trained(tokenizer):
    [labels] = mask_to_responses([ids(tokenizer, *CHAT)], None, make_markers(tokenizer, USER, ANSWER), last_response_only=True)
    assert trained(tokenizer, labels) == "a river<|eot_id|>"


def test_the_markers_of_a_template_are_its_headers(tokenizer):
    assert template_markers(tokenizer) == (USER, ANSWER)


def test_given_labels_that_are_masked_stay_masked(tokenizer):
    row = ids(tokenizer, *CHAT)
    given = np.where(row == tokenizer.eos_token_id, -100, row)
    [labels] = mask_to_responses([row], [given], make_markers(tokenizer, USER, ANSWER))
    assert trained(tokenizer, labels) == "the boata river"


def test_a_loose_marker_matches_where_its_newline_merged_with_a_neighbour():
    # 9 is the end of the marker in one place and part of another token in the other.
    markers = Markers(Marker("u", (1,)), Marker("a", (2,), right=((9,),)))
    labels = mask_to_responses([np.array([2, 9, 5]), np.array([2, 6, 5])], None, markers)
    assert [row.tolist() for row in labels] == [[-100, -100, 5], [-100, 6, 5]]


def test_a_marker_that_never_matches_is_named_with_its_count(tokenizer):
    rows = [ids(tokenizer, *CHAT), ids(tokenizer, *CHAT[:2])]
    with pytest.raises(ValueError, match=r"'### Answer:' matched in 0 of 2 rows"):
        mask_to_responses(rows, None, make_markers(tokenizer, USER, "### Answer:"))


def test_one_marker_alone_is_refused(tokenizer):
    with pytest.raises(ValueError, match="come together"):
        make_markers(tokenizer, USER)


def test_a_marker_without_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no token of the marker"):
        make_markers(tokenizer, USER, "")
