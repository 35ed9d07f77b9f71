//! rooms-tool
