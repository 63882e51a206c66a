//! The machine that all tests share: most wait for something nearly all the time, and several of them run at once, fewer beside
//! one that keeps it busy; those that measure time or rates have it for themselves.
//!
//! Tests that wait for their turn need a thread each: `cargo xtask test` has enough of them.

use std::cell::Cell;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Load of the tests that may run at once.
const LOAD_MAX: usize = 5;
/// Load of one that mostly waits, of one that keeps the machine busy, and of one that has it for itself.
const QUIET: usize = 1;
const BUSY: usize = 2;
const ALONE: usize = LOAD_MAX;

/// Load of the tests that run at present.
static LOAD: Mutex<usize> = Mutex::new(0);
static CHANGED: Condvar = Condvar::new();

thread_local! {
    /// Whether this thread's test has its turn already.
    static HELD: Cell<bool> = const { Cell::new(false) };
}

/// A test's turn at the machine, until this is dropped.
pub struct Turn {
    load: usize,
}

impl Turn {
    fn wait(load: usize) -> Self {
        let too_much = |running: &mut usize| *running + load > LOAD_MAX;
        let waited = CHANGED.wait_while(running(), too_much);
        *waited.unwrap_or_else(PoisonError::into_inner) += load;
        HELD.set(true);
        Self { load }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        HELD.set(false);
        *running() -= self.load;
        CHANGED.notify_all();
    }
}

fn running() -> MutexGuard<'static, usize> {
    LOAD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until no other test runs, and keeps them waiting. Comes before [`isolated`], never within, as [`busy`] does.
pub fn alone() -> Turn {
    Turn::wait(ALONE)
}

/// Waits until few other tests keep the machine busy.
pub fn busy() -> Turn {
    Turn::wait(BUSY)
}

/// Runs a test in a network namespace of its own ([`linux::testing::isolated`]), beside others that mostly wait unless it has
/// its turn already.
pub fn isolated(test: impl FnOnce() + Send) {
    let _turn = (!HELD.get()).then(|| Turn::wait(QUIET));
    linux::testing::isolated(test);
}
