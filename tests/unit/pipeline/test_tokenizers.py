import gzip

import pytest
from tiny_pipeline import tiny_clip_tokenizer, tiny_t5_tokenizer
from tokenizers import Tokenizer, models

from flux_nf4.errors import FormatError, ModelNotFoundError
from flux_nf4.pipeline.tokenizers import (
    Tokenizers,
    clip_tokenizer,
    packaged_tokenizer,
    tokenizer_from_folder,
)


@pytest.fixture(scope="module")
def tiny():
    return Tokenizers(t5=tiny_t5_tokenizer(), clip=tiny_clip_tokenizer())


@pytest.fixture(scope="module")
def flux1():
    return Tokenizers(
        t5=packaged_tokenizer("flux1", "t5"), clip=packaged_tokenizer("flux1", "clip")
    )


def test_t5_ends_with_its_mark_and_pads(flux1):
    ids, dropped = flux1.encode_t5(["a red apple"], 8)
    assert ids.tolist() == [[3, 9, 1131, 8947, 1, 0, 0, 0]]
    assert dropped == [""]


def test_clip_is_77_tokens_between_its_marks(flux1):
    ids = flux1.encode_clip(["a cat"])
    assert ids.shape == (1, 77)
    assert ids[0, :5].tolist() == [49406, 320, 2368, 49407, 49407]


def test_an_empty_prompt_is_marks_alone(tiny):
    assert tiny.encode_t5([""], 4)[0].tolist() == [[1, 0, 0, 0]]
    assert set(tiny.encode_clip([""])[0].tolist()) == {0, 1}


def test_what_does_not_fit_t5_is_told_in_words(tiny):
    ids, dropped = tiny.encode_t5(["a red cat on the apple", "a cat"], 4)
    assert ids.shape == (2, 4)
    assert ids[0, -1] == 1
    assert dropped == ["on the apple", ""]


def test_a_word_that_is_cut_in_two_is_told_whole(tiny):
    _, dropped = tiny.encode_t5(["a wombat here"], 5)
    assert dropped == ["wombat here"]


def test_what_does_not_fit_clip_is_told(tiny):
    assert tiny.dropped_by_clip("a cat") == ""
    assert tiny.dropped_by_clip("cat " * 25 + "apple dog") == "apple dog"


def test_a_full_prompt_drops_nothing(tiny):
    ids, dropped = tiny.encode_t5(["a red cat"], 4)
    assert ids.tolist()[0][-1] == 1
    assert dropped == [""]


def test_the_built_in_tokenizers_of_flux_have_all_their_tokens(flux1):
    assert flux1.t5.get_vocab_size() == 32_100
    assert flux1.clip.get_vocab_size() == 49_408


@pytest.mark.parametrize("name", ["../flux1", "a/b", "", "FLUX", "x" * 65, "flux1\n"])
def test_a_name_cannot_wander_through_folders(name):
    with pytest.raises(FormatError, match="not a tokenizer's name"):
        packaged_tokenizer(name, "t5")


def test_an_unknown_name_is_named():
    with pytest.raises(ModelNotFoundError, match="no t5 tokenizer named `flux9`"):
        packaged_tokenizer("flux9", "t5")


def test_a_folder_without_tokenizer_says_what_it_looked_for(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"neither tokenizer\.json nor vocab\.json"):
        tokenizer_from_folder(tmp_path, "clip")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"model": 3}', b"\xff\xfe", b"[" * 9999])
def test_a_damaged_tokenizer_is_a_format_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        tokenizer_from_folder(tmp_path, "t5")


def test_what_a_file_says_about_truncation_does_not_count(tmp_path):
    tokenizer = tiny_t5_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizer_from_folder(tmp_path, "t5")
    assert len(loaded.encode("a red cat on the apple").ids) == 6


def test_an_old_clip_folder_gives_the_packaged_tokenizer(tmp_path, flux1):
    model = flux1.clip.model
    model.save(str(tmp_path))  # vocab.json and merges.txt
    loaded = tokenizer_from_folder(tmp_path, "clip")
    prompt = "It's a Red  apple, n°5 <|endoftext|> 猫 ŒUVRE"
    expected = flux1.clip.encode(prompt, add_special_tokens=False).ids
    assert loaded.encode(prompt, add_special_tokens=False).ids == expected


@pytest.mark.parametrize(("vocab", "merges"), [("[", ""), ("{}", "a b c"), ('{"a": 0}', "a b")])
def test_a_damaged_vocabulary_is_a_format_error(vocab, merges):
    with pytest.raises(FormatError, match="CLIP vocabulary"):
        clip_tokenizer(vocab, merges)


def test_a_sentencepiece_model_alone_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"of whatever kind")
    with pytest.raises(FormatError, match=r"spiece\.model") as raised:
        tokenizer_from_folder(tmp_path, "t5")
    assert "tokenizer.json" in raised.value.hint


def test_a_vocabulary_without_marks_is_a_format_error():
    with pytest.raises(FormatError, match="lacks <pad>, </s>"):
        Tokenizers(t5=Tokenizer(models.BPE()), clip=tiny_clip_tokenizer())


def test_packaged_files_are_gzipped_json():
    from importlib import resources

    data = (resources.files("flux_nf4") / "assets/tokenizers/flux1/clip.json.gz").read_bytes()
    assert gzip.decompress(data).startswith(b"{")
