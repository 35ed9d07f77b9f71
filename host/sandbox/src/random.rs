//! Random numbers of a guest: `ChaCha` streams derived from the attempt's seed. "Secure" random is secure against the guest's
//! peers, not against whoever knows the seed; nothing in a sandbox has a secret to keep.

use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::seed::Seed;
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use wasmtime_wasi::p2::bindings::random::{insecure, insecure_seed, random};

use crate::fault::Stop;
use crate::guest::GuestState;
use crate::seeds::SeedSource;

/// The three random sources of WASI, each a stream of its own, so that using one never shifts another.
#[derive(Debug)]
pub(crate) struct GuestRandom {
    secure: ChaCha12Rng,
    insecure: ChaCha12Rng,
    insecure_seed: (u64, u64),
    bytes_max: u64,
    source: SeedSource,
    seed: Seed,
}

impl GuestRandom {
    /// `bytes_max` bounds one request.
    pub(crate) fn new(source: SeedSource, bytes_max: u64) -> Self {
        let in_force = source.seed();
        let seed = in_force.child("wasi-random");
        let hash_seed = seed.child("insecure-seed");
        Self {
            secure: ChaCha12Rng::seed_from_u64(seed.child("secure").value()),
            insecure: ChaCha12Rng::seed_from_u64(seed.child("insecure").value()),
            insecure_seed: (hash_seed.child_index(0).value(), hash_seed.child_index(1).value()),
            bytes_max,
            source,
            seed: in_force,
        }
    }

    /// Where a fork leaves its ancestor, the numbers begin anew.
    fn follow(&mut self) -> &mut Self {
        if !self.source.is_fixed() && self.source.seed() != self.seed {
            *self = Self::new(self.source.clone(), self.bytes_max);
        }
        self
    }

    fn fill(rng: &mut ChaCha12Rng, length: u64, bytes_max: u64) -> wasmtime::Result<Vec<u8>> {
        let refused = || Stop::limit(OutcomeKind::OutputLimit, "payload_bytes_max", bytes_max).error();
        if length > bytes_max {
            return Err(refused());
        }
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| refused())?];
        rng.fill_bytes(&mut bytes);
        Ok(bytes)
    }
}

impl<H: Send + 'static> random::Host for GuestState<H> {
    fn get_random_bytes(&mut self, length: u64) -> wasmtime::Result<Vec<u8>> {
        let random = self.random.follow();
        GuestRandom::fill(&mut random.secure, length, random.bytes_max)
    }

    fn get_random_u64(&mut self) -> wasmtime::Result<u64> {
        Ok(self.random.follow().secure.next_u64())
    }
}

impl<H: Send + 'static> insecure::Host for GuestState<H> {
    fn get_insecure_random_bytes(&mut self, length: u64) -> wasmtime::Result<Vec<u8>> {
        let random = self.random.follow();
        GuestRandom::fill(&mut random.insecure, length, random.bytes_max)
    }

    fn get_insecure_random_u64(&mut self) -> wasmtime::Result<u64> {
        Ok(self.random.follow().insecure.next_u64())
    }
}

impl<H: Send + 'static> insecure_seed::Host for GuestState<H> {
    fn insecure_seed(&mut self) -> wasmtime::Result<(u64, u64)> {
        Ok(self.random.follow().insecure_seed)
    }
}
