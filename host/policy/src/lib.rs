//! fulgurite-policy
