"""The laws on a device that is not the CPU: those below, run again with models on the pretend device, in a process of its own.

On a machine with a GPU the same runs there: `python -m pytest --device cuda` with any of these tests. What each may wait for is
counted in `device/waits.py`, which prints its table: see `python -m pytest tests/device/waits.py --device pretend`.
"""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
LAWS: dict[str, str] = {
    "test_text.py": """test_steering_changes_the_text_and_leaving_restores_it test_pads_are_never_touched
        test_cache_and_no_cache_agree[gate] test_cache_and_no_cache_agree[steps] test_cache_and_no_cache_agree[ramp]
        test_a_static_cache_agrees[steps] test_reading_the_prompt_in_chunks_agrees[mask]
        test_padded_and_unpadded_rows_agree[slice-None] test_padded_and_unpadded_rows_agree[rows-None]
        test_a_batch_of_different_settings_equals_single_runs test_each_beams_score_equals_a_steered_teacher_forced_pass
        test_sampled_return_sequences_follow_their_prompt test_assisted_decoding_agrees[scale]
        test_a_reused_cache_continues_as_one_conversation test_where_and_when_an_edit_acts
        test_a_gate_acts_where_another_concept_reads_high test_text_guidance_is_steered_on_the_branch_asked_for
        test_patching_a_concept_replays_another_run test_positions_that_were_not_recorded_are_left_alone
        test_recording_under_generate_sees_every_position_once test_nested_sessions_add_up test_several_banks_at_once
        test_hold_keeps_descendants_at_their_unsteered_reading test_graph_adds_the_forecast_at_the_later_site
        test_a_set_concept_is_cut_from_its_parents test_an_addition_is_capped_at_a_share_of_the_sites_norm
        test_a_value_is_capped_at_the_natural_ones test_gradient_checkpointing_runs_the_same_edits_again
        test_masks_and_tapes_follow_their_prompt_over_beams test_reports_tell_where_edits_acted""",
    "test_levers.py": """test_a_target_is_read_at_every_place test_gradients_reach_the_gate_through_its_ramp
        test_edits_of_several_sessions_keep_their_own_gates test_a_change_that_grew_with_its_token_is_cut_to_the_cap
        test_match_norm_multiplies_each_change_by_the_tokens_length_over_the_median[edit-full]
        test_hold_keeps_a_descendant_at_every_place test_amounts_follow_their_prompt_over_beams
        test_graph_moves_a_descendant_at_every_place_by_what_its_cause_was_moved""",
    "test_encoders.py": """test_a_latent_is_changed_in_the_code_and_the_rest_stays[{}-topk]
        test_a_latent_is_changed_in_the_code_and_the_rest_stays[{}-gated]
        test_additions_to_one_latent_count_together_before_the_floor
        test_targets_of_directions_hold_whatever_latents_do test_a_transcoder_reads_at_one_site_and_writes_at_a_later_one
        test_an_update_is_what_a_block_adds test_a_gate_opens_where_a_latent_fires""",
    "test_parts.py": """test_a_prompt_and_its_negative_are_told_apart_in_the_text_encoder
        test_a_latent_is_perturbed_in_a_part_of_the_picture_before_it_is_decoded
        test_a_recorded_run_is_replayed_at_each_noise_level_and_half_of_guidance
        test_tokens_where_a_concept_fires_are_replaced_by_those_of_another_run
        test_turning_a_token_keeps_its_length_where_it_acts test_a_mask_of_any_size_is_laid_over_the_tokens_of_each_row
        test_an_addition_grows_with_each_tokens_own_length_at_every_step""",
    "test_pipelines.py": "".join(
        f"""test_the_site_moves_by_exactly_the_vector_and_every_run_is_the_same[{family}]
        test_outside_its_window_an_edit_does_exactly_nothing[{family}]
        test_one_half_of_guidance_is_edited_alone[cond-uncond-{family}]
        test_a_batch_of_different_amounts_equals_single_runs[{family}]
        test_a_box_moves_the_tokens_it_covers_on_images_that_are_not_square[{family}]
        """
        for family in ("sd1", "flux")
    ),
    "test_shards.py": "test_one_pass_reads_all_sites_and_ends_at_the_deepest",
    "test_methods.py": """test_activations_are_those_of_the_answers_own_tokens
        test_a_method_gives_the_same_finite_lever_each_time_and_leaves_the_model_alone[difference-of-means]
        test_learning_lowers_the_loss_it_is_for[rank-one]
        test_learning_lowers_the_loss_it_is_for[distilled]
        test_a_gate_opens_between_a_quarter_and_three_quarters_of_the_way_to_answers""",
    "test_steered.py": """test_it_reads_what_record_does_of_every_token_but_the_first
        test_what_is_done_moves_later_layers_as_a_hook_by_hand_does
        test_a_graph_is_found_in_it_and_none_where_contexts_are_shuffled""",
    "test_mediation.py": "test_all_goes_through_all_that_a_layer_has_and_a_part_through_a_part",
    "test_evaluation.py": """test_likelihood_equals_the_models_own_loss test_side_effects_equal_a_second_implementation
        test_answers_repeat_with_their_seed_and_leave_the_global_generator_alone
        test_a_direction_towards_the_words_raises_them_with_the_dose_and_its_negative_lowers_them""",
    "test_training.py": "test_measurements_agree_with_what_they_were_made_from",
}
"""Tests by file; a name stands for all parameters."""


def test_the_laws_hold_on_a_device_of_its_own(capsys):
    nodes = [f"{TESTS / file}::{name}" for file, names in LAWS.items() for name in names.split()]
    own = [str(TESTS / "device" / name) for name in ("waits.py", "places.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--device", "pretend"]
    done = subprocess.run(
        [*command, "--tb=short", "--durations=25", *nodes, *own],
        env=dict(os.environ),
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    with capsys.disabled():
        print("", *(line for line in done.stdout.splitlines() if " each" in line), sep="\n")
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
