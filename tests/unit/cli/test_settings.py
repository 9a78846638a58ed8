import dataclasses

import pytest

from flux_nf4.cli.generate import GenerateOptions
from flux_nf4.cli.options import parameters
from flux_nf4.cli.settings import Settings, read_options, setting_parameters
from flux_nf4.errors import InputError


def options(flags=None, environment=None):
    return read_options(GenerateOptions, flags or {}, environment=environment or {})


def write(folder, text):
    (folder / "flux-nf4.toml").write_text(text, encoding="utf-8")


@pytest.fixture
def user_file(tmp_path):
    """Write the file in the user's configuration folder; gives the environment that names it."""

    def write_it(text):
        place = tmp_path / "config" / "flux-nf4"
        place.mkdir(parents=True)
        write(place, text)
        return {"XDG_CONFIG_HOME": str(tmp_path / "config")}

    return write_it


def test_defaults_hold_where_nothing_is_said():
    assert options() == GenerateOptions()


def test_a_flag_counts_over_a_variable():
    assert options({"steps": "4"}, {"FLUX_NF4_STEPS": "9"}).steps == 4


def test_a_variable_counts_over_the_file(folder):
    write(folder, "steps = 9")

    assert options(environment={"FLUX_NF4_STEPS": "4"}).steps == 4


def test_the_file_here_counts_over_the_users_key_by_key(folder, user_file):
    environment = user_file("steps = 9\nguidance = 2")
    write(folder, "steps = 4")

    assert (options(environment=environment).steps, options(environment=environment).guidance) == (
        4,
        2.0,
    )


def test_the_users_file_lies_in_the_home_folder_by_default(tmp_path):
    place = tmp_path / ".config" / "flux-nf4"
    place.mkdir(parents=True)
    write(place, "steps = 9")

    assert options(environment={"HOME": str(tmp_path)}).steps == 9


@pytest.mark.parametrize("name", sorted(each.name for each in parameters(Settings)))
def test_every_setting_may_come_from_a_variable(name):
    samples = {int: "16", float: "2.5", bool: "true", str: "text"}
    kind = setting_parameters()[name].kind
    text = kind[-1] if isinstance(kind, tuple) else samples[kind]
    value = getattr(options(environment={f"FLUX_NF4_{name.upper()}": text}), name)

    assert value == (text if isinstance(kind, tuple) else {"true": True}.get(text) or kind(text))


def test_the_prompt_is_no_setting():
    assert not {"prompt", "prompt_file", "json", "debug"} & set(setting_parameters())


def test_keys_may_be_written_with_hyphens(folder):
    write(folder, "true-cfg = 2")

    assert options().true_cfg == 2.0


def test_a_switch_on_in_the_file_can_be_put_off(folder):
    write(folder, "preview = true")

    assert options({"preview": "false"}).preview is False


def test_a_size_on_the_command_line_hides_width_and_height_below():
    chosen = options({"size": "64x64"}, {"FLUX_NF4_WIDTH": "128"})

    assert (chosen.size, chosen.width) == ("64x64", None)


def test_a_width_on_the_command_line_hides_the_size_below(folder):
    write(folder, 'size = "64x64"')
    chosen = options({"width": "128"})

    assert (chosen.size, chosen.width) == (None, 128)


def test_a_model_in_a_file_lies_relative_to_the_file(folder, user_file, tmp_path):
    environment = user_file('model = "flux.safetensors"')

    assert options(environment=environment).model == str(
        tmp_path / "config/flux-nf4/flux.safetensors"
    )


def test_the_demo_model_may_be_named_in_a_file(folder):
    write(folder, 'model = "demo"')

    assert options().model == "demo"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepz = 3", "unknown setting `stepz` in `flux-nf4.toml`"),
        ("steps = true", "`steps` in `flux-nf4.toml` must be a whole number, got `True`"),
        ("steps = 2.5", "`steps` in `flux-nf4.toml` must be a whole number, got `2.5`"),
        ("guidance = inf", "`guidance` in `flux-nf4.toml` must be a finite number, got `inf`"),
        ("model = 3", "`model` in `flux-nf4.toml` must be text, got `3`"),
        ("quiet = 'perhaps'", "`quiet` in `flux-nf4.toml` must be `true` or `false`"),
        ("[steps]\nn = 3", "`steps` in `flux-nf4.toml` must be a whole number"),
        ("size = '64x64'\nwidth = 64", "`flux-nf4.toml` gives both `size` and `width`"),
        ("steps = ", "the settings file `flux-nf4.toml` is not TOML"),
    ],
)
def test_a_bad_file_is_an_input_error(folder, text, said):
    write(folder, text)

    with pytest.raises(InputError) as caught:
        options()

    assert said in caught.value.message


def test_a_file_that_is_not_text_is_an_input_error(folder):
    (folder / "flux-nf4.toml").write_bytes(b"\xff\xfe")

    with pytest.raises(InputError, match="is not TOML"):
        options()


def test_a_folder_in_the_files_place_is_an_input_error(folder):
    (folder / "flux-nf4.toml").mkdir()

    with pytest.raises(InputError, match="cannot read the settings file"):
        options()


def test_an_unknown_key_is_told_the_nearest(folder):
    write(folder, "stepz = 3")

    with pytest.raises(InputError) as caught:
        options()

    assert "`steps`" in str(caught.value.hint)


def test_an_unknown_variable_is_told_the_nearest():
    with pytest.raises(InputError, match="unknown setting `FLUX_NF4_MODLE`") as caught:
        options(environment={"FLUX_NF4_MODLE": "x"})

    assert "`FLUX_NF4_MODEL`" in str(caught.value.hint)


def test_other_variables_are_left_alone():
    assert options(environment={"FLUX": "x", "_FLUX_NF4_COMPLETE": "y"}) == GenerateOptions()


def test_settings_cannot_change_during_a_run():
    with pytest.raises(dataclasses.FrozenInstanceError):
        options().steps = 3


def test_defaults_in_the_help_are_the_real_ones():
    shown = {each.name: each for each in parameters(Settings)}
    told = {name: shown[name].flag.help for name in ("count", "guidance", "true_cfg", "device")}
    real = {name: f"[{shown[name].default:g}]" for name in ("count", "guidance", "true_cfg")}
    real["device"] = f"[{shown['device'].default}]"

    assert {name: told[name].endswith(real[name]) for name in told} == dict.fromkeys(told, True)
