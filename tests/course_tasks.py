"""Which tests cover which task of the courses, so that `pytest -m task1_1` runs them.

The marks are those of MiniTorch's modules 0 to 4 (task<module>_<task>) and of the LLM-systems
course's first two assignments (a<assignment>_<problem>); their titles stand in `pyproject.toml`.
Tests are named by file and function, `*` stands for any part of a name. `tests/conftest.py` gives
the marks when pytest collects.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

TASKS: dict[str, str] = {
    "task0_0": "test_course_api::*",
    "task0_1": """
        test_operators::test_functions_of_* test_operators::test_derivatives_agree_with_differences
        test_operators::test_log_is_finite_at_zero test_operators::test_nan_goes_through_*
    """,
    "task0_2": """
        test_operators::test_functions_of_two_numbers
        test_operators::test_sigmoid_does_not_overflow test_testing::test_the_kinds_of_math_tests
    """,
    "task0_3": """
        test_operators::test_functions_of_lists test_operators::test_reduce_folds_from_the_left
    """,
    "task0_4": """
        test_module::test_names_and_order test_module::test_a_shared_parameter_*
        test_module::test_a_name_stands_for_one_thing test_module::test_unknown_names_*
        test_module::test_super_init_* test_module::test_train_and_eval_*
        test_module::test_calling_a_module test_module::test_repr_shows_the_tree
        test_module::test_a_parameter_tells_its_value_*
    """,
    "task0_5": """
        test_project_classic::test_manual test_module::test_data_sets test_module::test_labels
    """,
    "task1_0": "test_course_api::test_names test_course_api::test_signatures",
    "task1_1": "test_scalar::test_central_difference test_scalar::test_derivative_check_*",
    "task1_2": """
        test_scalar::test_one_argument test_scalar::test_two_arguments
        test_scalar::test_numbers_on_either_side test_scalar::test_comparisons_give_scalars
        test_scalar::test_forward_must_return_a_float
    """,
    "task1_3": "test_scalar::test_chain_rule_* test_scalar::test_history_by_hand",
    "task1_4": """
        test_scalar::test_one_argument test_scalar::test_two_arguments
        test_scalar::test_order_of_the_graph test_scalar::test_a_deep_graph_is_no_recursion
        test_scalar::test_derivatives_accumulate test_scalar::test_only_leaves_accumulate
        test_course_api::test_topological_order
    """,
    "task1_5": "test_project_classic::test_scalar_and_tensor_scripts_learn_the_same",
    "task2_0": """
        test_course_api::test_backend_and_tensor test_course_tensors::test_lists_keep_their_values_*
        test_course_tensors::test_factories_*
    """,
    "task2_1": """
        test_course_tensors::test_indices_and_positions
        test_course_tensors::test_permute_keeps_the_storage test_course_tensors::test_bad_indices
        test_course_tensors::test_bad_layouts test_course_tensors::test_contiguous
        test_course_tensors::test_indexing
    """,
    "task2_2": "test_course_tensors::test_broadcast",
    "task2_3": """
        test_functions_grad::test_value_and_gradient
        test_course_tensors::test_reductions_keep_the_dimension
        test_course_tensors::test_view_wants_* test_course_tensors::test_bad_views
    """,
    "task2_4": """
        test_functions_grad::test_value_and_gradient test_functions_grad::test_grad_check_*
        test_course_tensors::test_gradients_* test_course_tensors::test_a_view_passes_on_*
        test_course_tensors::test_a_function_written_by_a_student
        test_course_tensors::test_backward_of_many_elements_*
    """,
    "task2_5": """
        test_project_classic::test_scalar_and_tensor_scripts_learn_the_same
        test_optim::test_like_pytorch test_optim::test_zero_grad
    """,
    "task3_0": """
        test_course_api::test_importing_the_package_binds_numba_cuda
        test_course_api::test_backend_and_tensor test_project_classic::test_parallel_check
    """,
    "task3_1": """
        test_functions_grad::test_value_and_gradient test_fast_ops::test_map_*
        test_fast_ops::test_large_tensors test_fast_ops::test_reductions_of_nothing_*
        test_fast_ops::test_threads_change_no_bit test_fast_ops::test_the_loops_as_courses_call_them
    """,
    "task3_2": """
        test_course_tensors::test_matmul_shapes test_fast_ops::test_tensor_matrix_multiply
        test_fast_ops::test_matmul_of_any_layout test_fast_ops::test_products_in_blocks
    """,
    "task3_3": """
        test_cuda_ops::test_map test_cuda_ops::test_map_* test_cuda_ops::test_zip_*
        test_cuda_ops::test_reduce test_cuda_ops::test_reduce_* test_cuda_ops::test_sum_practice
        test_cuda_ops::test_sum_of_rows test_cuda_ops::test_practice_*
        test_cuda_ops::test_gradients_*
    """,
    "task3_4": "test_cuda_ops::test_mm_practice test_cuda_matmul::*",
    "task3_5": """
        test_project_classic::test_scalar_and_tensor_scripts_learn_the_same
        test_project_classic::test_upstream_spelling_of_options
    """,
    "task4_0": "test_course_api::test_names",
    "task4_1": "test_conv::*",
    "task4_2": "test_conv::*",
    "task4_3": """
        test_course_networks::test_tiles_and_pooling
        test_course_networks::test_a_kernel_that_does_not_divide_*
    """,
    "task4_4": """
        test_course_networks::test_argmax_and_ties test_course_networks::test_dropout_function
        test_course_networks::test_softmax_of_extremes
        test_course_networks::test_tiles_and_pooling
    """,
    "task4_4b": "test_device::test_operations_agree_with_the_cpu",
    "task4_5": "test_project_classic::test_digits test_project_classic::test_sentiment*",
    "a1_0": "test_cuda_ops::test_merge_dimensions test_course_tensors::test_indices_and_positions",
    "a1_1": """
        test_course_api::test_topological_order test_course_tensors::test_gradients_*
        test_course_tensors::test_a_function_written_by_a_student
    """,
    "a1_2": "test_kernel_ops::* test_cuda_ops::* test_cuda_matmul::*",
    "a1_3": "test_project_classic::test_the_network_of_the_course",
    "a1_4": "test_project_classic::test_sentiment*",
    "a2_0": "test_functions_grad::test_value_and_gradient",
    "a2_1": "test_functions_grad::test_value_and_gradient test_operators::test_functions_of_*",
    "a2_2": """
        test_course_networks::test_gelu_and_logsumexp test_course_networks::test_softmax_loss
        test_course_networks::test_one_hot_and_bad_classes
    """,
    "a2_3": """
        test_course_networks::test_embedding test_course_networks::test_linear
        test_course_networks::test_linear_* test_course_networks::test_layer_norm
        test_course_networks::test_dropout_module test_device_data::test_masks_*
    """,
    "a2_4": """
        test_course_networks::test_multi_head_attention
        test_course_networks::test_transformer_layer test_course_networks::test_decoder
        test_course_networks::test_the_classic_depth_is_four
    """,
}


def marks_of(file: str, function: str) -> list[str]:
    """The marks of a test.

    Args:
        file: its name, without folder and ending.
        function: the test's name, without parameters.

    """
    test = f"{file}::{function}"
    return [
        mark
        for mark, tests in TASKS.items()
        if any(fnmatchcase(test, pattern) for pattern in tests.split())
    ]
