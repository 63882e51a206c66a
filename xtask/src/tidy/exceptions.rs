//! Where a rule does not hold, and why.

use super::Violation;

/// One file, one rule.
pub struct Exception {
    /// Name of the rule.
    pub rule: &'static str,
    /// Path from the workspace's folder.
    pub file: &'static str,
    /// Part of the violation's message: which of several in the file is meant.
    pub about: &'static str,
    /// Why it is right here.
    pub reason: &'static str,
}

/// The list. Keep it short.
pub const EXCEPTIONS: &[Exception] = &[
    Exception {
        rule: "unsafe",
        file: "crates/packet/tests/no_allocation.rs",
        about: "",
        reason: "an allocator that counts cannot be written without",
    },
    Exception {
        rule: "unsafe",
        file: "crates/datapath/tests/nine_ways.rs",
        about: "",
        reason: "an allocator that counts cannot be written without",
    },
    Exception {
        rule: "sans-io",
        file: "sim/src/lib.rs",
        about: "`std::env`",
        reason: "the one way to repeat a failing run: its seed",
    },
    Exception {
        rule: "function-lines",
        file: "crates/tunnel/src/frame/tests.rs",
        about: "`examples`",
        reason: "a table: one frame of each kind with its bytes",
    },
    Exception {
        rule: "unsafe",
        file: "crates/packet/src/prefetch.rs",
        about: "",
        reason: "a prefetch has no safe form in the standard library; measured: a look-up among a million flows takes a quarter of the time",
    },
    Exception {
        rule: "sans-io",
        file: "crates/services/examples/flow_table.rs",
        about: "`Instant`",
        reason: "it measures pauses",
    },
    Exception {
        rule: "sans-io",
        file: "crates/services/examples/nat_ports.rs",
        about: "`Instant`",
        reason: "it measures rates",
    },
];

/// Leaves out what an exception covers, and reports exceptions that cover nothing.
pub fn apply(exceptions: &[Exception], found: Vec<Violation>) -> Vec<Violation> {
    let covers = |exception: &Exception, violation: &Violation| {
        exception.rule == violation.rule
            && exception.file == violation.file
            && violation.message.contains(exception.about)
    };
    let needless = exceptions.iter().filter(|exception| !found.iter().any(|v| covers(exception, v)));
    let mut kept: Vec<Violation> = needless
        .map(|exception| Violation {
            file: exception.file.to_owned(),
            line: 1,
            rule: "exception",
            message: format!(
                "the exception {} from `{}` is not needed any more; remove it from xtask/src/tidy/exceptions.rs ({})",
                exception.about, exception.rule, exception.reason
            ),
        })
        .collect();
    kept.extend(found.into_iter().filter(|v| !exceptions.iter().any(|exception| covers(exception, v))));
    kept
}
