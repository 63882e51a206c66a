//! Rings between workers, for what came to the wrong core only.
//!
//! Every pair of workers has one bounded ring each way; a full ring is a counted drop, never a wait.

use std::sync::Arc;

use datapath::Handed;
use rtrb::{Consumer, Producer, RingBuffer};

use crate::doorbell::Doorbell;

/// Items one ring holds.
const RING_ITEMS: usize = 1_024;

/// A worker's ends of all rings.
pub struct Rings<T = Handed> {
    senders: RingSenders<T>,
    receivers: RingReceivers<T>,
}

/// A worker's sending ends, by receiving core.
pub struct RingSenders<T = Handed> {
    rings: Vec<Option<Producer<T>>>,
    doorbells: Arc<Vec<Doorbell>>,
}

/// A worker's receiving ends.
pub struct RingReceivers<T = Handed> {
    rings: Vec<Consumer<T>>,
    /// Where the next item is looked for first: behind the ring of the last one, so that no ring that never runs empty
    /// lets others wait.
    next: usize,
}

/// All rings between the workers of these doorbells, one [`Rings`] for each, in core order.
pub fn mesh<T>(doorbells: &Arc<Vec<Doorbell>>) -> Vec<Rings<T>> {
    let cores = doorbells.len();
    let mut all: Vec<Rings<T>> = (0..cores)
        .map(|_| Rings {
            senders: RingSenders {
                rings: (0..cores).map(|_| None).collect(),
                doorbells: Arc::clone(doorbells),
            },
            receivers: RingReceivers { rings: Vec::new(), next: 0 },
        })
        .collect();
    for from in 0..cores {
        for to in (0..cores).filter(|to| *to != from) {
            let (producer, consumer) = RingBuffer::new(RING_ITEMS);
            all[from].senders.rings[to] = Some(producer);
            all[to].receivers.rings.push(consumer);
        }
    }
    all
}

impl<T> Rings<T> {
    /// Both directions apart.
    pub fn split(self) -> (RingSenders<T>, RingReceivers<T>) {
        (self.senders, self.receivers)
    }
}

impl<T> RingSenders<T> {
    /// Hands an item to another core; false when its ring is full, or there is no such core.
    pub fn push(&mut self, to: usize, item: T) -> bool {
        let Some(Some(producer)) = self.rings.get_mut(to) else { return false };
        let pushed = producer.push(item).is_ok();
        if let Some(doorbell) = self.doorbells.get(to) {
            doorbell.ring();
        }
        pushed
    }
}

impl<T> RingReceivers<T> {
    /// Next item from any other core, from each in turn.
    pub fn pop(&mut self) -> Option<T> {
        let cores = self.rings.len();
        for place in (self.next..cores).chain(0..self.next) {
            if let Some(Ok(item)) = self.rings.get_mut(place).map(Consumer::pop) {
                self.next = if place + 1 == cores { 0 } else { place + 1 };
                return Some(item);
            }
        }
        None
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.rings.iter().all(|ring| ring.is_empty())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::time::Duration;

    use linux::event::{Epoll, Interest};

    use super::*;

    type Item = (usize, u32);

    fn rings(cores: usize) -> (Arc<Vec<Doorbell>>, Vec<Rings<Item>>) {
        let doorbells = Arc::new((0..cores).map(|_| Doorbell::new().unwrap()).collect());
        let rings = mesh(&doorbells);
        (doorbells, rings)
    }

    #[test]
    fn items_of_one_core_come_in_their_order() {
        let (_, mut rings) = rings(3);
        assert!(rings[2].receivers.is_empty() && rings[2].receivers.pop().is_none());
        for number in 0..5 {
            assert!(rings[0].senders.push(2, (0, number)));
            assert!(rings[1].senders.push(2, (1, number)));
        }
        assert!(
            !rings[2].receivers.is_empty() && rings[0].receivers.is_empty() && rings[1].receivers.is_empty()
        );
        let items: Vec<_> = std::iter::from_fn(|| rings[2].receivers.pop()).collect();
        for from in 0..2 {
            let own: Vec<_> = items.iter().filter(|item| item.0 == from).map(|item| item.1).collect();
            assert_eq!(own, [0, 1, 2, 3, 4]);
        }
        assert!(rings[2].receivers.is_empty());
    }

    #[test]
    fn a_core_that_hands_over_more_than_is_taken_lets_the_others_come_too() {
        let (_, mut rings) = rings(4);
        for from in [0, 1, 2] {
            assert!(rings[from].senders.push(3, (from, 0)));
        }
        let mut taken = [0; 3];
        for number in 1..300 {
            assert!(rings[0].senders.push(3, (0, number)));
            let (from, _) = rings[3].receivers.pop().unwrap();
            taken[from] += 1;
        }
        assert_eq!(taken[1..], [1, 1]);
        while rings[3].receivers.pop().is_some() {}
        assert!(rings[1].senders.push(3, (1, 5)) && rings[0].senders.push(3, (0, 6)));
        let rest: Vec<_> = std::iter::from_fn(|| rings[3].receivers.pop()).collect();
        assert!(rest.len() == 2 && rest.contains(&(1, 5)) && rest.contains(&(0, 6)), "{rest:?}");
    }

    #[test]
    fn a_full_ring_refuses_and_keeps_what_it_has() {
        let (doorbells, mut rings) = rings(3);
        for number in 0..RING_ITEMS as u32 {
            assert!(rings[0].senders.push(1, (0, number)));
        }
        assert!(!rings[0].senders.push(1, (0, u32::MAX)), "full");
        assert!(rings[2].senders.push(1, (2, 7)), "every pair has its own");
        // A refused item wakes the reader all the same: it is what makes room.
        doorbells[1].prepare_sleep();
        assert!(!rings[0].senders.push(1, (0, u32::MAX)));
        assert!(!doorbells[1].is_asleep());
        assert_eq!(rings[1].receivers.pop(), Some((0, 0)));
        assert!(rings[0].senders.push(1, (0, 9)), "room for one");
        assert!(!rings[0].senders.push(1, (0, 10)));
        assert_eq!(std::iter::from_fn(|| rings[1].receivers.pop()).count(), RING_ITEMS + 1);
    }

    #[test]
    fn a_core_has_no_ring_to_itself_nor_to_one_that_does_not_exist() {
        let (_, mut rings) = rings(2);
        assert!(!rings[0].senders.push(0, (0, 1)));
        assert!(!rings[0].senders.push(2, (0, 1)));
    }

    #[test]
    fn many_producers_lose_nothing_and_keep_their_order() {
        const ITEMS: u32 = 20_000;
        let (doorbells, mut rings) = rings(4);
        let mut reader = rings.pop().unwrap();
        let producers: Vec<_> = rings
            .into_iter()
            .enumerate()
            .map(|(from, mut own)| {
                std::thread::spawn(move || {
                    for number in 0..ITEMS {
                        while !own.senders.push(3, (from, number)) {
                            std::thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        let epoll = Epoll::new().unwrap();
        epoll.add(doorbells[3].event(), 0, Interest::Read).unwrap();
        let (mut ready, mut next) = (Vec::new(), [0; 3]);
        while next != [ITEMS; 3] {
            while let Some((from, number)) = reader.receivers.pop() {
                assert_eq!(number, next[from]);
                next[from] += 1;
            }
            if next == [ITEMS; 3] {
                break;
            }
            doorbells[3].prepare_sleep();
            let empty = reader.receivers.is_empty();
            let wait = if empty { Duration::from_secs(30) } else { Duration::ZERO };
            epoll.wait(&mut ready, Some(wait)).unwrap();
            assert!(!empty || !ready.is_empty(), "items waited and nobody woke the reader");
            doorbells[3].woke(!ready.is_empty());
        }
        producers.into_iter().for_each(|producer| producer.join().unwrap());
    }
}
