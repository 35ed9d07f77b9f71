//! rooms-data
