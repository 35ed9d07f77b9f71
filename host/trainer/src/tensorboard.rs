//! TensorBoard event files: TFRecord framing around `tensorflow.Event` messages with scalar summaries.
//!
//! Written by hand: it is four protobuf fields, and the crates that do it are unmaintained or bring a whole runtime.
//! Format: TensorFlow's `record_writer.h` and `event.proto`, `summary.proto`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Appends events to a new file of a folder.
#[derive(Debug)]
pub(crate) struct EventWriter {
    file: BufWriter<File>,
}

impl EventWriter {
    /// Starts a file. Its name holds time and process, so that a resumed run adds a file and TensorBoard joins them.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(crate) fn create(folder: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let name = format!("events.out.tfevents.{:010.0}.fulgurite.{}.0", unix_seconds().floor(), std::process::id());
        let mut writer = Self { file: BufWriter::new(File::create(folder.join(name))?) };
        let mut event = vec![];
        put_double(&mut event, 1, unix_seconds());
        put_bytes(&mut event, 3, b"brain.Event:2");
        writer.record(&event)?;
        Ok(writer)
    }

    /// Writes the scalars of a step.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(crate) fn write(&mut self, step: u64, scalars: impl Iterator<Item = (String, f64)>) -> std::io::Result<()> {
        let mut summary = vec![];
        for (tag, number) in scalars {
            let mut value = vec![];
            put_bytes(&mut value, 1, tag.as_bytes());
            put_float(&mut value, 2, number);
            put_bytes(&mut summary, 1, &value);
        }
        let mut event = vec![];
        put_double(&mut event, 1, unix_seconds());
        put_varint(&mut event, 2 << 3);
        put_varint(&mut event, step);
        put_bytes(&mut event, 5, &summary);
        self.record(&event)
    }

    fn record(&mut self, data: &[u8]) -> std::io::Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        self.file.write_all(&length)?;
        self.file.write_all(&masked_crc(&length).to_le_bytes())?;
        self.file.write_all(data)?;
        self.file.write_all(&masked_crc(data).to_le_bytes())?;
        self.file.flush()
    }
}

/// TFRecord's checksum: CRC-32C, rotated and shifted so that a checksum of data that holds checksums stays good.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn put_varint(buffer: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        buffer.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    buffer.push(value.to_le_bytes()[0]);
}

fn put_bytes(buffer: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_varint(buffer, (field << 3) | 2);
    put_varint(buffer, bytes.len() as u64);
    buffer.extend_from_slice(bytes);
}

fn put_double(buffer: &mut Vec<u8>, field: u64, value: f64) {
    put_varint(buffer, (field << 3) | 1);
    buffer.extend_from_slice(&value.to_le_bytes());
}

#[expect(clippy::cast_possible_truncation, reason = "the format has 32-bit scalars")]
fn put_float(buffer: &mut Vec<u8>, field: u64, value: f64) {
    put_varint(buffer, (field << 3) | 5);
    buffer.extend_from_slice(&(value as f32).to_le_bytes());
}

fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_framed_with_masked_checksums() {
        // The published check value of CRC-32C, masked.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(folder.path()).unwrap();
        writer.write(300, [("grpo/reward".to_owned(), 0.25)].into_iter()).unwrap();
        let file = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        let bytes = std::fs::read(file).unwrap();
        let mut rest = bytes.as_slice();
        let mut records = vec![];
        while !rest.is_empty() {
            let (head, tail) = rest.split_at(12);
            assert_eq!(masked_crc(&head[..8]).to_le_bytes(), head[8..12]);
            let length = usize::try_from(u64::from_le_bytes(head[..8].try_into().unwrap())).unwrap();
            let (data, tail) = tail.split_at(length);
            let (crc, tail) = tail.split_at(4);
            assert_eq!(masked_crc(data).to_le_bytes(), crc);
            records.push(data.to_vec());
            rest = tail;
        }
        assert_eq!(records.len(), 2);
        assert!(records[0].ends_with(b"brain.Event:2"));
        // step 300 as field 2, then the summary with tag and value
        let expected: Vec<u8> = [
            &[0x10, 0xac, 0x02, 0x2a, 0x14, 0x0a, 0x12, 0x0a, 0x0b][..],
            b"grpo/reward",
            &[0x15],
            &0.25_f32.to_le_bytes(),
        ]
        .concat();
        assert_eq!(records[1][9..], expected);
    }
}
