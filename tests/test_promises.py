"""Every promise of breadth that README, documentation and docstrings make, and the tests that range over it.

A sentence that says "any" promises something of everything of a kind. It stands here with how much of the kind is
tried, and where. A sentence that is not here fails, and so does one here that nobody says any more. What cannot be
tried in its breadth has to be said otherwise.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Promise(NamedTuple):
    """A promise.

    Attributes:
        words: Parts of the sentences that make it, "any" among them.
        breadth: Over what it is tried.
        tests: Where, ``module::test``.
    """

    words: tuple[str, ...]
    breadth: str
    tests: tuple[str, ...]


PROMISES = [
    Promise(
        ("any network of timm ([docs/timm.md]", "any timm model, or one that states D"),
        "a network of every module file of timm with a classifier: built, trained, explained, counted, kept",
        ("families::test_no_family_of_timm_is_left_out", "families::test_a_classifier_on_any_family"),
    ),
    Promise(
        (
            "any network of timm with maps",
            "on any timm backbone",
            "any backbone",
            "dense detector on any timm",
            "as a module; any plain ViT",
        ),
        "the same files: found objects in, or was refused in a line",
        ("families::test_a_detector_on_any_family", "families::test_sizes_that_a_detectors_backbone_does_not_take"),
    ),
    Promise(
        ("any plain ViT", "Any plain ViT"),
        "every plain ViT of timm by its kind, pretrained and detected with; every other family is refused by name",
        (
            "families::test_a_masked_autoencoder_on_every_kind_of_plain_vit",
            "families::test_a_masked_autoencoder_on_every_vit_of_timm",
            "families::test_a_masked_autoencoder_refuses_other_families_by_name",
        ),
    ),
    Promise(
        ("in any form that",),
        "pairs, tensors alone, dicts under all keys, named tuples, and whatever stands where labels do, in all steps",
        (
            "any_batch::test_every_form_of_a_batch_gives_one_loss",
            "any_batch::test_a_technique_without_labels_takes_anything_beside_the_images",
            "any_batch::test_named_tuples_of_a_loader_are_trained_on_evaluated_and_drawn",
            "batch::test_images_are_found",
            "batch::test_targets_are_found",
            "batch::test_what_holds_no_images_is_refused",
        ),
    ),
    Promise(
        ("weights of any plain vision transformer of timm and of its NaFlexViT",),
        "every name of timm's vision_transformer and naflexvit files: the same features, or refused by name",
        (
            "packed_vit::test_any_plain_vision_transformer_of_timm_gives_the_same_or_is_refused_by_name",
            "packed_vit::test_naflexvits_weights_give_its_padded_features_or_it_is_refused_by_name",
        ),
    ),
    Promise(
        ("images of any size", "Images of any size", "a Vision Transformer for any Aspect Ratio and Resolution"),
        "sides from 1 to 2200 pixels in all aspects up to 200; all loaders; those that are too large are named",
        (
            "vision_tokenizer::test_the_maximum_holds_for_all_sizes_and_ranges",
            "vision_tokenizer::test_an_image_that_cannot_be_taken_is_named",
            "any_size_data::test_grids_keep_the_aspect_and_the_number_of_patches",
            "any_size_data::test_a_folders_batches_keep_to_the_budget_and_to_each_images_key",
            "any_size_data::test_torchvisions_files_have_sizes_of_their_own",
        ),
    ),
    Promise(
        (
            "any module trains on your data",
            "works under any LightningModule",
            "Callbacks for any LightningModule",
            "serve any module",
        ),
        "modules and data that know nothing of the zoo, with every guard, callback and recipe's data",
        (
            "guards::test_in_a_trainer_of_ones_own_a_run_is_continued_exactly_and_its_checkpoints_say_what_made_them",
            "callbacks::test_other_modules_say_themselves_what_is_written_or_are_asked_to",
            "callbacks::test_a_module_without_pictures_is_left_alone",
        ),
    ),
    Promise(
        ("under any Trainer", "serves any Trainer", "plugin of any Trainer"),
        "Trainers with the tools that Lightning has, each continued exactly",
        (
            "guards::test_a_run_with_a_tool_of_lightnings_is_continued_exactly",
            "checkpoints::test_a_trainers_checkpoints_are_whole_safe_and_continued",
        ),
    ),
    Promise(
        ("any timm network with tokens or maps", "of any timm network, or of one that packs"),
        "a network of every module file of timm: tokens with the grid of their image, or refused in a line",
        (
            "vision_tokens::test_the_tables_have_every_family_of_timm",
            "vision_tokens::test_tokens_of_every_family_have_the_grid_of_their_image",
            "vision_tokens::test_networks_that_give_neither_tokens_nor_maps_are_refused_but_for_a_layer",
        ),
    ),
    Promise(
        ("tokens (T, in_width) of images of any grids", "B images (C, H, W) of any sizes"),
        "packings of several grids, with and without a prefix, by every connector; a packed tower; a whole model",
        (
            "connectors::test_packed_images_are_as_one_by_one_and_what_stands_for_no_patch_is_left_out",
            "vision_tokens::test_a_packed_tower_gives_what_timms_network_gives",
            "vision_language_training::test_images_of_any_size_reach_it_through_a_packed_tower",
        ),
    ),
    Promise(
        ("of any module with a ``backbone``", "timm's Swin in any module with a `backbone`"),
        "towers of an aligner, a classifier and another model; Swin among the families",
        (
            "vision_language_training::test_a_tower_comes_of_an_aligner_or_a_classifier",
            "families::test_a_classifier_on_any_family",
        ),
    ),
    Promise(("can name any class",), "not a promise but a warning, with a command that refuses them", ()),
    Promise(
        ("what any recipe's model costs", "of any module and without its weights", "a network of any size"),
        "every recipe; models of others; none of them in memory",
        ("cost::test_every_recipe_has_a_cost", "cost::test_models_of_others"),
    ),
    Promise(
        (
            "of one pass, in any mode",
            "before any module sees them",
            "any may hide another",
            "Any recipe of an",
            "any other file with timm's",
            "Any other file does not say",
            "If there are any, but for what pools",
            "do not show in any shape",
            "an image of hardly any contrast",
            "before any rounding",
            "if there are any",
            "before any of them is decoded",
            "off by any amount",
            "any class where there is none",
            "[any size](any_size.md)); not the rotations",
            "another sample's images and without any",
            "a batch without any image",
            "at any time sorts",
            "shapes and colours without any",
            "If there are any, one object",
        ),
        "says something of one thing, and nothing of a kind",
        (),
    ),
    Promise(
        ("any real number", "any real phi", "of any size by the rule", "at any width and depth"),
        "multipliers of both signs, with the least and the greatest that make a network",
        (
            "scaling::test_the_rule_at_any_real_phi",
            "scaling::test_more_width_or_depth_is_never_less_of_it",
            "scaling::test_a_phi_too_small_names_the_least_one",
            "scaling::test_a_phi_too_large_names_the_largest_one",
        ),
    ),
    Promise(
        (
            "images of any size from the total stride",
            "of any one size, normalised",
            "at any size: bottleneck",
            "Images of any size (C, h, w), padded",
        ),
        "sides that nothing divides, from the smallest that is taken",
        (
            "efficientnet::test_images_of_any_size_and_channels",
            "fpn_detector::test_levels_are_found_by_their_stride_in_images_of_any_size",
            "scaling::test_images_below_the_total_stride",
        ),
    ),
    Promise(
        ("Any of them works without", "f is any function"),
        "every estimator by enumeration of its expectation",
        (
            "estimators::test_unbiased_estimators_agree_with_enumeration",
            "estimators::test_every_estimator_is_among_the_tested",
        ),
    ),
    Promise(
        ("logits: (..., K), any precision",),
        "half precisions, with logits up to infinity",
        (
            "estimators::test_samples_and_noise_are_in_single_precision_at_least",
            "estimators::test_half_precision_gives_no_nan",
        ),
    ),
    Promise(
        ("or any other, of which the newest", "in any order; where it is not"),
        "run folders moved, copied and of other loggers",
        ("continuing::test_words_and_folders",),
    ),
    Promise(
        (
            "make any loop continue",
            "serves any DataLoader",
            "``worker_init_fn`` for any DataLoader",
            "by any number of them",
        ),
        "loops and loaders without Lightning, of several batch sizes, numbers of workers and processes",
        (
            "base::test_evaluation_sees_each_sample_once_in_equally_many_batches",
            "base::test_the_global_batches_do_not_depend_on_the_number_of_ranks",
            "resume::test_another_number_of_processes_continues_the_global_order",
            "preemption::test_workers_of_any_loader_outlive_a_terminals_signals_where_they_are_forked",
        ),
    ),
    Promise(
        ("any of its batches on any rank",),
        "each batch of an accumulated step; each of two processes",
        ("nonfinite::test_a_step_is_skipped_for_any_of_its_batches", "nonfinite::test_two_processes_skip_together"),
    ),
    Promise(
        ("any process of the run", "any SLURM job"),
        "a signal to one rank, to all, to the agent; jobs, arrays, interactive ones",
        (
            "preemption::test_all_ranks_leave_at_the_same_step_when_one_gets_a_signal",
            "preemption::test_a_signal_to_one_rank_ends_all_that_lightning_has_started",
            "preemption::test_slurm_requeues_the_job_and_the_same_program_continues",
        ),
    ),
    Promise(
        ("any number of processes, and any strategy",),
        "saved under FSDP2 by two, continued by one and under DDP",
        ("sharding::test_a_checkpoint_of_split_weights_is_whole_and_anyone_goes_on_from_it",),
    ),
    Promise(
        ("any subset can be predicted",),
        "subsets against all of them predicted at once",
        ("mae::test_cross_predictions_do_not_depend_on_each_other",),
    ),
    Promise(
        ("continued at any time",),
        "what is finished stays, what is not is run",
        (
            "search::test_a_sweep_runs_what_is_not_finished_and_nothing_else",
            "search::test_search_continues_and_names_the_winner",
        ),
    ),
    Promise(
        ("module: Any module",),
        "the techniques, networks of timm, modules without Lightning",
        ("weights::test_into_a_network_without_lightning", "weights::test_a_lightning_checkpoint"),
    ),
    Promise(
        ("or any other with, for a split",),
        "the layouts that programs write",
        ("coco::test_usual_layouts_are_found", "coco_layouts::test_splits_are_found_under_their_usual_names"),
    ),
    Promise(
        ("at any depth",),
        "folders in folders, and links",
        (
            "folder::test_a_folder_is_predicted_at_any_depth_in_the_order_of_names",
            "folder::test_links_are_followed_but_not_in_circles",
        ),
    ),
    Promise(
        ("any number of images", "on any number of workers", "in any order and any process"),
        "images by number, with and without workers, in another process",
        (
            "shapes::test_an_image_is_a_function_of_seed_and_index",
            "shapes::test_another_process_renders_the_same",
            "shapes::test_the_number_of_workers_changes_nothing",
        ),
    ),
    Promise(
        ("metrics may then be any",),
        "every metric of the techniques, in every precision",
        (
            "precision::test_states_of_every_metric_stay_float32_or_wider",
            "precision::test_metrics_are_those_of_float32_within_rounding",
        ),
    ),
    Promise(
        ("the labels of any data module with ``classes``", "in any order and any subset"),
        "folders and files of annotations: reordered, renumbered, subsets, one class, other Unicode forms; validated, "
        "tested, predicted, continued",
        (
            "classes::test_any_data_module_with_classes_is_read_by_name",
            "classes::test_a_folder_is_read_by_name",
            "classes::test_a_json_is_read_by_name",
            "classes::test_a_folder_with_an_unknown_class_is_refused_and_predicted",
        ),
    ),
    Promise(
        ("Labels may be any numbers", "of 0 and 1, of any dtype"),
        "from negative ones to the largest, all whole dtypes",
        (
            "any_batch::test_neighbours_are_those_of_known_class_and_their_numbers_do_not_matter",
            "any_batch::test_classes_of_every_whole_dtype_are_read",
            "any_batch::test_several_labels_of_another_form_are_refused_too",
        ),
    ),
]
# After "any more" or "any further" nothing is promised.
SAYS_ANY = re.compile(r"\b[Aa]ny\b(?! (?:more|further)\b)")
AROUND = 60  # characters before and behind, in which the words of a promise are looked for


@cache
def documents() -> list[tuple[str, str]]:
    """README, documentation and public docstrings, with their places; each in one line."""
    return list(_documents())


def _documents() -> Iterator[tuple[str, str]]:
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        yield file.name, " ".join(file.read_text().split())
    for package in ("zoo", "datamodules"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                is_described = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                if is_described and not getattr(node, "name", "").startswith("_"):
                    place = f"{file.relative_to(ROOT)}, {getattr(node, 'name', 'the file')}"
                    yield place, " ".join((ast.get_docstring(node) or "").split())


def test_every_any_is_a_promise_that_is_tried():
    untried = []
    for place, text in documents():
        words = (each for promise in PROMISES for each in promise.words)
        kept = [found.span() for each in words for found in re.finditer(re.escape(each), text)]
        for found in SAYS_ANY.finditer(text):
            if not any(start <= found.start() and found.end() <= end for start, end in kept):
                untried.append(f"{place}: ...{text[max(0, found.start() - AROUND) : found.end() + AROUND]}...")
    assert not untried, "\n".join(untried)


@pytest.mark.parametrize("promise", PROMISES, ids=[promise.words[0] for promise in PROMISES])
def test_every_promise_is_made_and_its_tests_are_there(promise):
    for words in promise.words:
        assert any(words in text for _, text in documents()), f"nobody says {words!r} any more"
    for test in promise.tests:
        module, _, name = test.partition("::")
        functions = ast.walk(ast.parse((ROOT / "tests" / f"test_{module}.py").read_text()))
        assert any(isinstance(node, ast.FunctionDef) and node.name == name for node in functions), test
