"""The table of faults: what each does to the service, within what bound, and the tests that prove it.

docs/reliability.md is made from it (`python -m tests.faults`), `make faults` runs its tests.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One fault. `tests` are node ids: a file, a function of one, or one case of a function.

    `bound` is what the tests assert; `nearest` says what no test can do, and which comes nearest.
    """

    number: int
    fault: str
    shows: str
    bound: str
    tests: tuple[str, ...]
    nearest: str = ""


def tests(folder: str, **names: str) -> tuple[str, ...]:
    """Node ids from file names and, apart by blanks, function names: none means the whole file."""
    return tuple(
        f"tests/{folder}/test_{file}.py{f'::test_{name}' if name else ''}"
        for file, text in names.items()
        for name in text.split() or [""]
    )


ROWS = (
    Row(
        1,
        "The platform's status endpoint refuses, hangs, answers 500, or has a certificate that nobody signed",
        "The engine starts all the same; events are sent beside it, from a bounded queue, with retries; a warning",
        "launch < 100 ms later",
        (
            *tests("faults", platforms="the_service_is_ready_and_warns the_launch_is_not_delayed"),
            *tests(
                "platforms",
                events="a_refusing_endpoint_costs_a_warning a_silent_endpoint_holds_up_nobody "
                "a_failing_platform_is_tried_again a_certificate_that_nobody_signed_is_refused "
                "a_full_queue_drops_the_oldest",
            ),
            *tests("contract", composition="dead_status_endpoint"),
        ),
    ),
    Row(
        2,
        "SIGKILL of the engine core, of a worker process, or by the kernel for want of memory",
        "Unready; whatever the exit code, an end that nobody asked for is a crash: event, restart, rows asked again",
        "unready ≤ 1 s",
        (
            *tests("faults", real_engine="the_core_is_killed_under_load the_core_is_killed_while_idle "
                   "a_worker_is_killed a_worker_is_killed_for_want_of_memory"),
            *tests("faults", crashes="an_engine_that_ends_with_0_at_1_s_again_and_again"),
            *tests("e2e", survival="rows_survive_the_death_of_the_engine_core",
                   score="three_deaths_of_the_engine_core_lose_nothing"),
        ),
    ),
    Row(
        3,
        "SIGKILL of the engine's API server alone",
        "Unready at once, though what it left behind takes its time to die; all of that is killed; restart",
        "unready ≤ 1 s, new start ≤ 5 s after",
        (
            *tests("faults", real_engine="the_api_server_is_killed"),
            *tests("faults", crashes="an_api_server_whose_worker_will_not_die"),
            *tests("supervisor", service="an_engine_that_dies_is_started_again",
                   process="what_a_dead_engine_left_behind_is_killed a_dead_guardian_takes_the_engine_with_it "
                   "a_dead_guardian_is_noticed_although_its_pipes_stay_open"),
        ),
    ),
    Row(
        4,
        "The engine hangs, and its /health says 200",
        "Somebody waits and none of its own counters moves for 120 s (`--hang-timeout`; the tests use 10 and 2): the "
        "stacks of each of its processes are logged, then it is killed and started again",
        "unready ≤ 1.5 times `--hang-timeout` + 2 s",
        (
            *tests("faults", real_engine="the_core_is_stopped"),
            *tests("supervisor", service="a_hanging_engine_is_killed_and_started_again", hang="", stacks=""),
            *tests("settings", resolve="no_stats_no_watch"),
        ),
        "The control, an hour at saturation without a restart, is `make soak ARGS=--control`",
    ),
    Row(
        5,
        "A crash loop",
        "A budget of restarts in a window, each later than the one before and not at the same moment everywhere; "
        "reset when stable; then exit 70 and the last event",
        "exit 70 after exactly the budget",
        (
            *tests("faults", crashes="an_engine_that_ends_with_0_at_1_s_again_and_again"),
            *tests("supervisor", restarts="", service="an_engine_that_never_starts_ends_the_service"),
        ),
    ),
    Row(
        6,
        "A bad configuration: broken JSON or YAML, a key twice, an unknown flag",
        "Exit 78 that names file, line, key, and the nearest name that exists; never a restart",
        "exit ≤ 2 s",
        (
            *tests("faults", folders="bad_configuration"),
            *tests("cli", check="a_bad_folder_exits_78_and_says_why"),
            *tests("model", engine_config="errors_name_the_place",
                   metadata="errors_name_the_file_the_key_and_the_line"),
            *tests("settings", engine="a_flag_that_vllm_does_not_know"),
            *tests("engine", flags="unknown_flag_is_told_fast_and_without_torch"),
        ),
    ),
    Row(
        7,
        "`load_model` raises, leaves by os._exit, is killed, hangs, or writes half of the weights",
        "It has a process and a deadline of its own; an unfinished run is run again; weights are checked before the "
        "launch; the message is in /status, in the event and in the log, exit 78",
        "half-written weights: exit ≤ 2 s",
        (
            *tests("faults", folders="a_hook_that_writes_half_the_weights a_hook_that_was_killed_is_run_again"),
            *tests("supervisor", service="a_hook_that_fails_in_any_way_ends_the_service "
                   "the_error_server_says_why_until_sigterm",
                   hook="a_deadline_ends_it_and_what_it_started leaving_early_is_a_failure "
                   "state_knows_a_run_that_did_not_finish"),
            *tests("examples", smollm2="a_killed_run_leaves_no_weights_and_is_made_good"),
        ),
    ),
    Row(
        8,
        "The port is taken",
        "The socket is bound before anything else: exit 78, and no engine was started",
        "exit < 1 s",
        tests("supervisor", service="a_taken_port_ends_at_once", runtime="a_taken_port_is_an_error_with_a_remedy"),
    ),
    Row(
        9,
        "Weights cut short, a shard missing, a damaged header, a changed byte",
        "Headers, extents and index are checked before the launch, hashes too where there is a manifest: exit 78 "
        "names the file",
        "exit ≤ 2 s",
        (
            *tests("faults", folders="damaged_weights"),
            *tests("engine", weights="damage_is_named extents missing_shard_is_found_without_an_index"),
            *tests("supervisor", verification="other_weights_end_the_start"),
            *tests("cli", check="weights_are_checked weights_that_are_not_what_the_manifest_says"),
        ),
        "Without a manifest a changed byte inside a tensor is a number like any other: nothing can see it",
    ),
    Row(
        10,
        "The disk is full",
        "Looked at before what is large; exit 74 that names the place; rows that were committed are intact, and the "
        "same command goes on",
        "no committed row is lost",
        (
            *tests("faults", disks=""),
            *tests("batch", run="a_full_disk_ends_the_run_with_what_was_answered",
                   journal="a_full_disk_is_an_io_error_and_the_same_journal_goes_on",
                   writing="a_full_disk_is_an_error_of_ours"),
            *tests("supervisor", download="a_disk_that_is_too_small_is_said_first"),
            *tests("gateway", abuse="a_full_disk_is_said_and_leaves_nothing_behind"),
            *tests("airgap", archive="a_disk_that_is_too_small_is_seen_before",
                   bundle="a_full_disk_leaves_nothing_new"),
        ),
    ),
    Row(
        11,
        "The model folder is read-only; a service was killed in it before",
        "Nothing is written into it: state lives in the state folder, sockets and keys in a runtime folder that the "
        "next start sweeps when its process is dead",
        "no file of the folder changes",
        (
            *tests("faults", folders="a_read_only_folder_serves_and_a_killed_service_leaves_nothing_in_it"),
            *tests("supervisor", runtime="what_a_killed_process_has_left_is_swept nothing_else_is_swept"),
        ),
    ),
    Row(
        12,
        "A slow load",
        "/livez 200; /readyz and /startupz 503 with the stage, until it is ready",
        "answers while hook and engine load",
        (
            *tests("supervisor", service="the_socket_answers_while_the_hook_runs_and_the_engine_loads"),
            *tests("contract", routes="first_answer_within_four_seconds probes_while_loading"),
            *tests("gateway", routes="phases"),
        ),
    ),
    Row(
        13,
        "SIGTERM, three times, with 50 streams open; or before anything has started",
        "New work is refused with 503 until the engine has stopped, what runs ends whole; exit 0, or 75 when it did "
        "not end in time",
        "drain ≤ 25 s (`--drain-timeout`)",
        (
            *tests("faults", real_engine="sigterm_with_50_streams"),
            *tests("e2e", survival="sigterm_with_open_streams"),
            *tests(
                "supervisor",
                service="sigterm_waits_for_what_runs who_comes_while_the_engine_stops_is_refused_not_reset "
                "a_drain_that_takes_too_long_is_cut_off_and_told sigterm_ends_it_at_any_moment "
                "signals_until_the_very_end_do_not_change_the_exit_code",
            ),
            *tests("cli", serve="a_stop_signal_before_anything_has_started_is_an_orderly_end"),
        ),
        "The 30 ms in which Python itself starts have no handler: a SIGTERM then ends the process by that signal",
    ),
    Row(
        14,
        "As PID 1, with orphans that fork twice",
        "Collected; SIGTERM ends it in order",
        "no zombie after 3 s",
        tests("supervisor", service="as_pid_1_it_reaps_and_stops"),
    ),
    Row(
        15,
        "The client leaves: before the first token, in a stream, in a CSV",
        "The engine works for nobody: no request runs in it",
        "running = 0 within 2 s",
        (
            *tests("e2e", survival="a_client_that_leaves_ends_the_engines_work"),
            *tests("gateway", forward="a_client_that_leaves_aborts_the_engine "
                   "a_client_that_leaves_the_queue_leaves_no_trace", predictions="leaving_aborts_the_engines_work"),
            *tests("contract", pains="leaving_client_ends_its_rows leaving_client_ends_the_generation"),
        ),
        "The engine drops nobody before the end of its step; one that reads dozens of prompts can take longer than 2 s "
        "on two cores, so the test leaves when their completions have begun",
    ),
    Row(
        16,
        "The engine dies in the middle of a stream",
        "An error frame and no `[DONE]`: half an answer never looks like a whole one",
        "no `[DONE]`",
        (
            *tests("faults", real_engine="the_core_is_killed_under_load"),
            *tests("e2e", survival="rows_survive_the_death_of_the_engine_core"),
            *tests("gateway", forward="engine_death_in_a_stream_ends_in_an_error_frame "
                   "core_death_in_a_stream_has_no_done an_aborted_stream_has_no_done "
                   "engine_death_in_a_large_answer_cuts_the_connection"),
        ),
    ),
    Row(
        17,
        "Ten times the load that fits",
        "A bounded queue, then 429 with Retry-After; the admitted hardly notice",
        "429 ≤ 100 ms, p99 of the admitted at most doubled",
        (
            *tests("gateway", overload="",
                   forward="overload_is_429_at_once a_refusal_comes_within_milliseconds"),
            *tests("gateway", predictions="no_more_requests_at_once_than_there_is_memory_for"),
            *tests("settings", resolve="as_many_requests_as_the_engine_runs_and_half_as_many_waiting"),
        ),
    ),
    Row(
        18,
        "Headers and bodies that trickle",
        "Cut off at a limit that is documented; a good client does not notice",
        "good client < 1 s",
        tests("gateway", abuse="tricklers_are_cut_off_and_a_good_client_does_not_notice", connections="",
              routes="half_a_header_is_cut_off", limits="a_slow_body_is_408",
              tls="clients_that_never_finish_their_handshake_keep_nobody_out"),
    ),
    Row(
        19,
        "A header of 300 MiB",
        "431 or 400; it is not kept",
        "≤ 64 KiB of header",
        tests("gateway", sizes="", routes="a_huge_header_is_refused"),
    ),
    Row(
        20,
        "A body of 1 GB, chunked, or with a Content-Length that lies",
        "413 while it comes in: 64 MiB for rows and 8 MiB for JSON, unless said otherwise",
        "memory ≤ cap + 32 MiB",
        tests("gateway", sizes="", forward="a_huge_body_is_413_while_it_comes", limits="a_body_over_the_limit_is_413"),
    ),
    Row(
        21,
        "An error that repeats its input",
        "Bounded, and without the input",
        "≤ 16 KiB",
        (
            *tests("gateway", abuse="no_error_is_longer_than_16_kib",
                   forward="engine_errors_are_bounded the_input_is_not_echoed", openai="the_input_is_not_repeated"),
            *tests("e2e", abuse="twelve_thousand_errors_are_one_short_answer"),
        ),
    ),
    Row(
        22,
        "A request that is poison: n = 16,384, a regular expression that kills",
        "Numbers and lists are bounded at the gateway (`--max-n`, 8 by default); what has killed vLLM elsewhere leaves "
        "the engine alive",
        "n > 8: the engine is not asked",
        (
            *tests("gateway", abuse="completions_are_bounded_by_every_door the_bound_is_the_folders_to_raise "
                   "a_list_is_bounded_by_every_door"),
            *tests("e2e", abuse="poison_leaves_the_engine_alive"),
        ),
    ),
    Row(
        23,
        "10,000 rows, 137 of them broken",
        "As many out as in, in order, with a reason for each that failed",
        "N in = N out",
        (
            *tests("gateway", predictions="ten_thousand_rows_of_which_137_are_broken"),
            *tests("batch", run="broken_rows_of_ten_kinds_fail_and_no_others"),
            *tests("e2e", rows="200_rows_of_which_four_are_broken"),
        ),
    ),
    Row(
        24,
        "A byte order mark, UTF-16, NUL, a cell of 10 MB, bytes that are no text",
        "The mark goes, the charset is honoured, else 400 with the offset of the byte",
        "the offset of the byte",
        (
            *tests("scoring", rows="byte_order_marks_go_and_charsets_are_honoured nul_bytes_are_characters "
                   "large_cells bytes_that_are_no_text_are_named_by_their_offset"),
            *tests("gateway", predictions="bytes_that_are_no_text_are_named_by_offset "
                   "the_charset_of_a_body_and_of_a_part_is_honoured large_cells_and_answers"),
        ),
    ),
    Row(
        25,
        "`score` is killed at any moment",
        "A journal that is only added to, a manifest that knows the work, one rename at the end: every row once",
        "50 kills, byte for byte the same output",
        (
            *tests("batch", run="sigkill_at_random_points_loses_and_doubles_nothing sigterm_keeps_what_was_answered "
                   "changed_input_and_parameters_are_refused",
                   journal="sigkill_loses_nothing_that_was_added a_torn_end_is_cut_off_wherever_it_was_torn",
                   ray="a_node_dies_and_every_row_has_one_answer"),
        ),
    ),
    Row(
        26,
        "A malicious archive, a link that leads out, a YAML bomb",
        "An allow-list of our own (no links out, no devices, no `..`) with bounds in size and ratio; aliases are "
        "refused, and files over 1 MiB",
        "the canary is untouched",
        (
            *tests("airgap", unpack="", verify="a_poisoned_tar", bundle="links_that_lead_elsewhere"),
            *tests("model", metadata="an_alias_bomb_is_refused_at_once"),
            *tests("platforms", push="a_link_out_of_the_folder_is_not_followed"),
        ),
    ),
    Row(
        27,
        "Secrets in logs, events, errors, archives, command lines",
        "From the environment or a file, never a command line; what children print is redacted",
        "0 hits, raw, base64, URL-encoded, split",
        (
            *tests("fuzz", canaries=""),
            "tests/test_logging.py",
            *tests("supervisor", process="a_secret_is_hidden_wherever_a_line_is_cut",
                   download="the_token_is_sent_and_never_on_a_command_line"),
            *tests("engine", command="the_hub_token_is_in_the_environment_and_nowhere_else"),
        ),
    ),
    Row(
        28,
        "A route that answers without a key",
        "All but the six probes ask for it",
        "every route by every method",
        tests("gateway", doors="every_route_has_its_line nothing_but_the_probes_answers_without_a_key "
              "no_header_but_the_right_key_opens", engine_routes="each_is_401_without_a_key"),
    ),
    Row(
        29,
        "A path in disguise: `//`, `%2f`, `%2e%2e`, an odd Host",
        "One path is decided on, in its canonical form",
        "no other spelling leads anywhere",
        tests("gateway", doors="with_the_key_an_odd_path_still_leads_nowhere no_header_but_the_right_key_opens",
              access="canonical_path", routes="an_odd_host_changes_nothing"),
    ),
    Row(
        30,
        "The engine's administrative routes",
        "Refused unless on a list of inference and reading; media are fetched from nowhere unless hosts are listed",
        "every route of the installed vLLM",
        (
            *tests("e2e", abuse="only_the_allow_list_of_the_running_engine_can_be_reached"),
            *tests("gateway", engine_routes="", routes="everything_else_is_404_and_reaches_no_engine",
                   openai="the_engines_other_routes_are_not_listed"),
            *tests("settings", engine="no_remote_media_unless_hosts_are_listed"),
            *tests("faults", media=""),
        ),
        "No picture reaches the example, a text model: vLLM's own fetcher is asked instead, with our flags",
    ),
)  # fmt: skip


def named(nodeid: str) -> bool:
    """Whether a row names this test, its function or its file."""
    file, _, function = nodeid.partition("::")
    return not {nodeid, f"{file}::{function.partition('[')[0]}", file}.isdisjoint(_ALL)


_ALL = frozenset(test for row in ROWS for test in row.tests)
